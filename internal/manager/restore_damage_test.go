package manager

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"

	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestRestoreOfDamagedFiles damages a file of each kind in each way: the job fails, names
// the file, and leaves nothing.
func TestRestoreOfDamagedFiles(t *testing.T) {
	damages := []struct {
		name, reason string
		known        bool // found by a registered ETag only
		do           func(t *testing.T, o object.Store, key string) error
	}{
		{"missing", "SOURCE_OBJECT_MISSING", false, func(t *testing.T, o object.Store, key string) error {
			return o.Delete(t.Context(), key)
		}},
		{"shorter", "SOURCE_OBJECT_ALTERED", false, func(t *testing.T, o object.Store, key string) error {
			_, err := o.Put(t.Context(), key, []byte("nine byte"))
			return err
		}},
		{"longer", "SOURCE_OBJECT_ALTERED", false, func(t *testing.T, o object.Store, key string) error {
			_, err := o.Put(t.Context(), key, []byte("eleven byte"))
			return err
		}},
		{"other bytes", "SOURCE_OBJECT_ALTERED", true, func(t *testing.T, o object.Store, key string) error {
			_, err := o.Put(t.Context(), key, []byte("TEN BYTES."))
			return err
		}},
	}
	kinds := []string{
		segment.KindInsert, segment.KindDelta, segment.KindStats, segment.KindBM25,
		segment.KindIndex, segment.KindText, segment.KindJSON, "of-an-engine",
	}
	for _, damage := range damages {
		for _, kind := range kinds {
			for _, known := range []bool{false, true} {
				if damage.known && !known {
					continue
				}
				t.Run(fmt.Sprintf("%s %s, ETag known %v", damage.name, kind, known), func(t *testing.T) {
					inEnv(t, func(t *testing.T, e *env) {
						r := e.start("a")
						s := e.create(r, e.richCollection(r, "c", 12), "one")
						var path string
						for _, seg := range e.segments(r, s) {
							for f := range seg.AllFiles() {
								if f.Kind == kind && (f.ETag != "") == known {
									path = f.Path
								}
							}
						}
						if path == "" {
							t.Fatal("no such file")
						}
						good := e.readObject("data/" + path)
						if err := damage.do(t, e.objects, "data/"+path); err != nil {
							t.Fatal(err)
						}
						sp := restoreSpecOf(s)
						e.mustFail(r, sp, damage.reason, "default/data/"+path)
						// With the original content the restore completes.
						if _, err := e.objects.Put(t.Context(), "data/"+path, good); err != nil {
							t.Fatal(err)
						}
						e.checkNextRestore(r, e.contents(), sp)
					})
				})
			}
		}
	}
}

// TestRestoreOfDamagedManifests damages each object of the snapshot.
func TestRestoreOfDamagedManifests(t *testing.T) {
	for _, name := range []string{manifest.MetadataName, "manifest-0.avro"} {
		for how, damage := range map[string]func([]byte) []byte{
			"missing":   nil,
			"truncated": func(b []byte) []byte { return b[:len(b)/2] },
			"altered":   func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
			"empty":     func([]byte) []byte { return nil },
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				inEnv(t, func(t *testing.T, e *env) {
					a := e.start("a")
					s := e.create(a, e.richCollection(a, "c", 4), "one")
					a.stop() // with its cache of manifests
					b := e.start("b")
					key := manifest.Dir(s.Collection, s.ID) + name
					if damage == nil {
						if err := e.objects.Delete(t.Context(), key); err != nil {
							t.Fatal(err)
						}
					} else if _, err := e.objects.Put(t.Context(), key, damage(e.readObject(key))); err != nil {
						t.Fatal(err)
					}
					sp := restoreSpecOf(s)
					if name == manifest.MetadataName {
						before := e.contents()
						_, err := b.Restore(t.Context(), noToken, sp)
						wantError(t, err, snapshot.ErrCorrupt)
						e.checkNoTraces(before)
						return
					}
					e.mustFail(b, sp, "SNAPSHOT_CORRUPT", name)
					sp.SkipIndexes = true // the admission then reads all segments
					_, err := b.Restore(t.Context(), noToken, sp)
					wantError(t, err, snapshot.ErrCorrupt)
				})
			})
		}
	}
}

// TestRestoreWithAlteredReads makes a store alter some or all reads of an object of the
// snapshot, which is itself whole. The restore completes after some, and fails after many.
func TestRestoreWithAlteredReads(t *testing.T) {
	for _, name := range []string{manifest.MetadataName, "manifest-0.avro"} {
		for how, fault := range map[string]object.Fault{"flipped": object.FaultFlip, "truncated": object.FaultTruncate} {
			for _, times := range []int{1, 2, 3, 6, math.MaxInt} {
				t.Run(fmt.Sprintf("%s %s %d times", name, how, times), func(t *testing.T) {
					inEnv(t, func(t *testing.T, e *env) {
						leader := e.start("leader")
						settle()
						r := e.start("r", func(o *testOptions) { o.Parts.Slots = -1 })
						s := e.create(r, e.richCollection(r, "c", 4), "one")
						settle()
						left := times // from here on only the leader reads it
						leader.store.Plan(func(c object.Call) object.Fault {
							if c.Op != object.OpGet || !strings.HasSuffix(c.Keys[0], name) || left == 0 {
								return object.FaultNone
							}
							left--
							return fault
						})
						sp := restoreSpecOf(s)
						if times < math.MaxInt {
							e.mustComplete(r, sp)
							if left != 0 {
								t.Errorf("%d of %d answers were not requested", left, times)
							}
							return
						}
						e.mustFail(r, sp, "SNAPSHOT_CORRUPT", name)
						if reads := times - left; reads < 10 {
							t.Errorf("given up after %d reads", reads)
						}
						leader.clearFaults()
						e.mustComplete(r, sp)
					})
				})
			}
		}
	}
}

// TestRestoreWithoutMetadataObject deletes the metadata object between the admission and
// prepare, which another replica executes.
func TestRestoreWithoutMetadataObject(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a")
		s := e.create(a, e.richCollection(a, "c", 4), "one")
		settle()
		before := e.contents()
		key := manifest.Dir(s.Collection, s.ID) + manifest.MetadataName
		g := newKiller()
		g.failWrite(a, 3, meta.Before, true) // the writes before it allocate ids and admit the job
		job := e.restore(a, restoreSpecOf(s))
		if err := e.objects.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		delete(before.objects, key)
		if e.waitEndedOrDead(g) {
			t.Fatal("the first replica is not dead")
		}
		a.stop()
		b := e.start("b")
		end := e.waitEnded(b, job.ID)
		if end.Job.State != copyjob.Failed || end.Job.Reason != "SNAPSHOT_CORRUPT" ||
			!strings.Contains(end.Job.Message, manifest.MetadataName) {
			t.Errorf("%+v", end.Job)
		}
		e.checkNoTraces(before)
	})
}

// falseStore answers one copy with success and does not make it.
type falseStore struct {
	object.Store
	keyPart string // of the source's key

	mu       sync.Mutex
	answered bool
}

func (l *falseStore) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	l.mu.Lock()
	skip := !l.answered && strings.Contains(r.From, l.keyPart)
	l.answered = l.answered || skip
	l.mu.Unlock()
	if skip {
		return object.Info{Key: r.To, Size: r.Size, ETag: r.SourceETag}, nil
	}
	return l.Store.Copy(ctx, r)
}

// TestRestoreVerifiesCopies checks that a copy that was answered but not made is found and
// repeated.
func TestRestoreVerifiesCopies(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		l := &falseStore{keyPart: "/of-an-engine/"}
		r := e.start("a", func(o *testOptions) {
			l.Store = o.Stores["default"]
			o.Stores = map[string]object.Store{"default": l}
		})
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		job := e.mustComplete(r, restoreSpecOf(s))
		end := e.waitEnded(r, job.ID)
		if !l.answered || end.Retries != 1 {
			t.Errorf("skipped a copy: %v, %+v", l.answered, end)
		}
	})
}
