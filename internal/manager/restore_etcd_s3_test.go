//go:build linux && !short

package manager

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/etcdtest"
	"github.com/snapshotd/snapshotd/test/s3fault"
)

// smallParts makes every job copy files in parts of the smallest size.
type smallParts struct{ meta.KV }

func (k smallParts) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	for i := range t.Then {
		op := &t.Then[i]
		if op.Kind != meta.OpPut || !strings.HasPrefix(op.From, keys.JobPrefix) {
			continue
		}
		job, err := copyjob.DecodeJob(meta.KeyValue{Key: op.From, Value: op.Value})
		if err != nil {
			return meta.TxnResult{}, err
		}
		job.Parts = object.CopyParts{Threshold: object.MinPartSize, PartSize: object.MinPartSize}
		op.Value = job.Encode("small")
	}
	return k.KV.Txn(ctx, t)
}

// TestRestoreOnEtcdAndS3 restores on etcd and S3, small files and one in parts: without
// faults, with refusals of an overloaded store, and with an altered file.
func TestRestoreOnEtcdAndS3(t *testing.T) {
	e, through, proxy := onS3(t)
	e.kv, e.memory = etcdtest.Shared(t).KV(t), nil
	r := e.start("a", func(o *testOptions) {
		o.Stores, o.KV = map[string]object.Store{"default": through}, smallParts{o.KV}
	})
	col := e.richCollection(r, "c", 40)
	large := e.segment(r, col, 0, 1, 9)
	f := &large.Files[0]
	f.Size = 12<<20 + 5
	f.Path = catalog.NativePath(col.ID, &large, f)
	content := make([]byte, f.Size)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(content); err != nil {
		t.Fatal(err)
	}
	info, err := e.objects.Put(t.Context(), "data/"+f.Path, content)
	if err != nil {
		t.Fatal(err)
	}
	f.ETag = info.ETag
	e.add(r, col, large)
	s := e.create(r, col, "one")

	sp := restoreSpecOf(s)
	job := e.mustComplete(r, sp)
	var copied []segment.Segment
	if _, err := r.catalog.ScanSegments(t.Context(), job.Target, 0, func(batch []segment.Segment) error {
		copied = append(copied, batch...)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	last := &copied[len(copied)-1].Files[0]
	if !strings.HasSuffix(last.ETag, "-3") || !bytes.Equal(e.readObject("data/"+last.Path), content) {
		t.Errorf("the large file was copied as %+v", last)
	}

	// The store is overloaded for a while.
	proxy.Plan(s3fault.Rule{Skip: 5, Times: 30, Action: s3fault.Status(503, "SlowDown")})
	sp.Name = "overloaded"
	began := time.Now()
	e.mustComplete(r, sp)
	t.Logf("on an overloaded store it took %v", time.Since(began))
	if proxy.Fired() == 0 {
		t.Error("no fault happened")
	}
	proxy.Plan()

	content[len(content)/2] ^= 1
	if _, err := e.objects.Put(t.Context(), "data/"+f.Path, content); err != nil {
		t.Fatal(err)
	}
	sp.Name = "altered"
	e.mustFail(r, sp, "SOURCE_OBJECT_ALTERED", f.Path)
	if n, err := e.objects.AbortUploads(t.Context(), "", time.Time{}); err != nil || n != 0 {
		t.Errorf("%d uploads are open, err = %v", n, err)
	}
	if err := dropErr(r, s); err != nil {
		t.Error(err)
	}
}
