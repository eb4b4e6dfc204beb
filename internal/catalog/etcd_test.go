//go:build !short

package catalog_test

import (
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

func TestEtcd(t *testing.T) {
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			s.run(t, etcdtest.Shared(t).KV(t))
		})
	}
}

func BenchmarkAddSegments(b *testing.B) {
	const n, files = 20_000, 12
	ctx := b.Context()
	bytes := 0
	for b.Loop() {
		b.StopTimer()
		kv := etcdtest.Shared(b).KV(b)
		e := newEnv(b, kv)
		var list []segment.Segment
		for _, id := range e.ids(b, n) {
			list = append(list, e.makeSegment(id, files))
		}
		b.StartTimer()
		if added, _, err := e.AddSegments(ctx, e.col.ID, list); err != nil || added != n {
			b.Fatalf("added %d, %v", added, err)
		}
		b.StopTimer()
		from, to := keys.All()
		bytes = 0
		if _, err := kv.Scan(ctx, from, to, 0, func(kvs []meta.KeyValue) error {
			for _, kv := range kvs {
				if strings.HasPrefix(kv.Key, keys.SegmentPrefix(e.col.ID)) {
					bytes += len(kv.Value)
				}
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "segments/s")
	b.ReportMetric(float64(bytes)/n, "bytes/record")
}
