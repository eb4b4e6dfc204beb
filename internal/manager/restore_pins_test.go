package manager

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// alterUnpinned replaces the files without a registered ETag by others of the same size,
// and returns their original content.
func (e *env) alterUnpinned(segments []segment.Segment) map[string][]byte {
	e.t.Helper()
	was := map[string][]byte{}
	for i := range segments {
		for f := range segments[i].AllFiles() {
			if f.ETag != "" {
				continue
			}
			key := "data/" + f.Path
			was[key] = e.readObject(key)
			if _, err := e.objects.Put(e.t.Context(), key, bytes.Map(func(r rune) rune { return r ^ 1 }, was[key])); err != nil {
				e.t.Fatal(err)
			}
		}
	}
	return was
}

// filePairs maps the keys of a snapshot's files to those of the restored collection.
func (e *env) filePairs(segments []segment.Segment, target int64) map[string]string {
	e.t.Helper()
	var got []segment.Segment
	cat := catalog.New(catalog.Options{KV: e.kv, Now: e.now})
	_, err := cat.ScanSegments(e.t.Context(), target, 0, func(batch []segment.Segment) error {
		got = append(got, batch...)
		return nil
	})
	if err != nil || len(got) != len(segments) {
		e.t.Fatalf("%d segments of %d, err = %v", len(got), len(segments), err)
	}
	pairs := map[string]string{}
	for i := range got {
		var to []string
		for f := range got[i].AllFiles() {
			to = append(to, "data/"+f.Path)
		}
		for f := range segments[i].AllFiles() {
			pairs["data/"+f.Path], to = to[0], to[1:]
		}
	}
	return pairs
}

// TestRestoreOfFilesAlteredBetweenAttempts kills the replica at each request of a restore
// and alters files without a registered ETag before another replica continues. Once a file
// was copied, the restore completes with the original content or fails with the name of a
// file.
func TestRestoreOfFilesAlteredBetweenAttempts(t *testing.T) {
	failed, completed := 0, 0
	for _, fault := range []object.Fault{object.FaultBefore, object.FaultAfter} {
		forEachFault(t, 200, func(n int) (fired bool) {
			inEnv(t, func(t *testing.T, e *env) {
				a := e.start("a")
				s := e.create(a, e.richCollection(a, "c", 5), "one")
				settle()
				before := e.contents()
				segments := e.segments(a, s)
				g := newKiller()
				g.failRequest(a, n, fault, 1, true)
				sp, tok := restoreSpecOf(s), token("t", "restore")
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				_, err := a.Restore(ctx, tok, sp)
				cancel()
				if err == nil && e.waitEndedOrDead(g) {
					return
				}
				fired = true
				a.stop()
				copied := len(e.contents().objects) > len(before.objects)+1 // one is the pins
				was := e.alterUnpinned(segments)
				b := e.start("b")
				job := e.mustRestore(b, tok, sp)
				end := e.waitEnded(b, job.ID)
				settle()
				switch end.Job.State {
				case copyjob.Completed:
					completed++
					pairs := e.filePairs(segments, job.Target)
					for from, content := range was {
						if copied && !bytes.Equal(e.readObject(pairs[from]), content) {
							t.Errorf("request %d, fault %v: COMPLETED with altered bytes of %s", n, fault, from)
						}
					}
				case copyjob.Failed:
					failed++
					named := false
					for from := range was {
						named = named || strings.Contains(end.Job.Message, from)
					}
					if end.Job.Reason != "SOURCE_OBJECT_ALTERED" || !named {
						t.Errorf("request %d, fault %v: %s: %s", n, fault, end.Job.Reason, end.Job.Message)
					}
					e.checkNoTraces(before)
				default:
					t.Errorf("request %d, fault %v: %v", n, fault, end.Job.State)
				}
			})
			return fired
		})
	}
	t.Logf("%d restores failed, %d completed", failed, completed)
	if failed < 10 || completed < 4 {
		t.Error("too few of one kind")
	}
}

// TestRestoreKeepsPins checks that the pins of a restore's files stay until its job is
// forgotten, that files with a registered ETag have none, and that late pins of a frozen
// worker are swept.
func TestRestoreKeepsPins(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a", atLeisure)
		col := e.richCollection(a, "c", 100) // four tasks
		s := e.create(a, col, "one")
		job := e.mustComplete(a, restoreSpecOf(s))
		list := e.objectsUnder(catalog.RestorePrefix)
		if len(list) != 4 || list[0] != fmt.Sprintf("gc/restore/%d/pins-0-0.json", job.ID) {
			t.Errorf("%v", list)
		}
		again := e.create(a, catalog.Collection{ID: job.Target}, "two") // all of its ETags are registered
		sp := restoreSpecOf(again)
		sp.Name = "second"
		e.mustComplete(a, sp)
		if more := e.objectsUnder(catalog.RestorePrefix); len(more) != 4 {
			t.Errorf("%v", more)
		}
		time.Sleep(6 * 24 * time.Hour)
		settle()
		if more := e.objectsUnder(catalog.RestorePrefix); len(more) != 4 {
			t.Errorf("%v, after six days", more)
		}
		time.Sleep(2 * 24 * time.Hour)
		settle()
		if more := e.objectsUnder(catalog.RestorePrefix); len(more) != 0 || len(e.keysUnder(keys.JobPrefix)) != 0 {
			t.Errorf("%v, after eight days", more)
		}
		if _, err := e.objects.Put(t.Context(), catalog.PinsKey(job.ID, 3, 0), []byte("late")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(26 * time.Hour)
		settle()
		if more := e.objectsUnder(catalog.RestorePrefix); len(more) != 0 {
			t.Errorf("%v, after a sweep", more)
		}
	})
}

// TestRestoreWithAlteredPins alters reads of the pins: the task is tried again, and no
// file is copied by altered pins.
func TestRestoreWithAlteredPins(t *testing.T) {
	for _, fault := range []object.Fault{object.FaultFlip, object.FaultTruncate} {
		inEnv(t, func(t *testing.T, e *env) {
			a := e.start("a")
			s := e.create(a, e.richCollection(a, "c", 5), "one")
			left, copies := 3, 0
			a.store.Plan(func(c object.Call) object.Fault {
				switch {
				case c.Op == object.OpCopy && copies < 2:
					copies++
					return object.FaultBefore
				case c.Op == object.OpGet && strings.HasPrefix(c.Keys[0], catalog.RestorePrefix) && left > 0:
					left--
					return fault
				}
				return object.FaultNone
			})
			e.mustComplete(a, restoreSpecOf(s))
			if left != 0 {
				t.Errorf("fault %v: %d altered answers were not requested", fault, left)
			}
		})
	}
}
