package manager

import (
	"context"
	"fmt"
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// TestGrantWaitsForTheCommit checks that a replica that has received progress beyond the
// commit of a snapshot, but not the commit, does not grant the snapshot's segment.
func TestGrantWaitsForTheCommit(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a")
		late := &lateEvents{KV: e.kv, sent: make(chan struct{})}
		b := e.start("b", func(o *testOptions) { o.KV = late })
		col, _, _ := e.collection(a, "c")
		s := e.segment(a, col, 0, 1, 20)
		e.add(a, col, s)
		e.checkpoint(a, col, 100, 100)
		settle()
		e.create(a, col, "one")
		asks := e.dropSegments(a, col, s.ID)
		ref := catalog.Ref{ID: col.ID}
		_, err := b.GC.Check(t.Context(), ref, asks)
		wantError(t, err, gc.ErrLoading)
		_, err = b.GC.Reclaim(t.Context(), ref, asks, gc.ByCaller, "")
		wantError(t, err, gc.ErrLoading)
		_, err = b.GC.Counts(t.Context(), col.ID)
		wantError(t, err, gc.ErrLoading)
		if _, err := e.objects.Put(t.Context(), fmt.Sprintf("data/%d/0/99/insert/100/1", col.ID), []byte("x")); err != nil {
			t.Fatal(err)
		}
		wantError(t, b.Collector.Orphans(t.Context(), collect.OrphanOptions{
			Collection: ref, Report: func(o collect.Orphan) error { t.Errorf("listed %+v", o); return nil },
		}), gc.ErrLoading)
		close(late.sent)
		e.collection(a, "another") // for which the replica requests progress
		answers, err := b.GC.Reclaim(t.Context(), ref, asks, gc.ByCaller, "")
		if err != nil {
			t.Fatal(err)
		}
		if len(answers) != 1 || answers[0].State != gc.Dropped || len(answers[0].Snapshots) != 1 {
			t.Errorf("answers %+v, want one snapshot that holds the segment", answers)
		}
	})
}

// lateEvents is an etcd that reports progress before the events of snapshots, which it
// sends once sent is closed.
type lateEvents struct {
	meta.KV
	sent chan struct{}
}

func (k *lateEvents) Watch(ctx context.Context, from, to string, after int64) meta.Watcher {
	w := k.KV.Watch(ctx, from, to, after)
	if from != keys.SnapshotPrefix {
		return w
	}
	return &lateWatcher{Watcher: w, sent: k.sent}
}

type lateWatcher struct {
	meta.Watcher
	sent      chan struct{}
	overtaken bool
}

func (w *lateWatcher) Next() (meta.WatchBatch, error) {
	b, err := w.Watcher.Next()
	if err != nil {
		return b, err
	}
	select {
	case <-w.sent:
		if w.overtaken {
			return meta.WatchBatch{}, meta.ErrWatchBroken
		}
	default:
		w.overtaken = w.overtaken || len(b.Events) > 0
		b.Events = nil
	}
	return b, nil
}
