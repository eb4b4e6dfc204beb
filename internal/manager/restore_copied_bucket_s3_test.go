//go:build linux && !short

package manager

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/s3quirks"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// restartOn stops the replica and starts another one on a store with the same objects, as
// after a change of the configuration.
func (w *testEnv) restartOn(r *testReplica, store object.Store) *testReplica {
	r.stop()
	w.objects = store
	return w.start("b", func(o *testOptions) { o.Stores = map[string]object.Store{"default": store} })
}

// checkOtherLayout checks that the plan of a restore, a restore and a create that verifies
// name the file and report an ETag of another layout.
func (w *testEnv) checkOtherLayout(
	r *testReplica, s *snapshot.Record, col catalog.Collection, path string, parts ...string,
) {
	w.t.Helper()
	parts = append(parts, path, "ETag of another layout", "no checksum was registered")
	check := func(what, text string) {
		for _, part := range parts {
			if !strings.Contains(text, part) {
				w.t.Errorf("%s reports %q, want %q in it", what, text, part)
			}
		}
		if strings.Contains(text, "altered") || strings.Contains(text, "replaced") {
			w.t.Errorf("%s reports of an equal file: %q", what, text)
		}
	}
	sp := restoreSpecOf(s)
	plan, err := r.PlanRestore(w.t.Context(), sp, true)
	if err != nil {
		w.t.Fatal(err)
	}
	check("the plan", strings.Join(plan.Missing, "; "))
	end := w.mustFail(r, sp, "SOURCE_ETAG_LAYOUT", path)
	check("the restore", end.Job.Message)
	verified := spec(col, "verified")
	verified.Verify = true
	_, err = r.Create(w.t.Context(), noToken, verified)
	if !errors.Is(err, ErrFileMissing) {
		w.t.Fatalf("a create that verifies: err = %v", err)
	}
	check("the create", err.Error())
}

// TestBucketCopiedInOtherParts copies a bucket in parts of another size, as other tools
// do, and uses the copy. Only the file in parts is refused, as one of another layout. A
// copy in the recorded parts restores.
func TestBucketCopiedInOtherParts(t *testing.T) {
	const size = 12<<20 + 5
	o := s3test.Bucket(t)
	o.MultipartThreshold, o.PartSize = 5<<20, 8<<20
	original := s3test.Open(t, o)
	w, _, _ := onS3(t)
	w.objects = original
	r := w.start("a")
	col, _, _ := w.collection(r, "c")
	small, large := w.segment(r, col, 0, 1, 9), w.segment(r, col, 1, 1, 9)
	put := func(s *segment.Segment, content []byte) {
		f := &s.Files[0]
		info, err := original.Put(t.Context(), "data/"+f.Path, content)
		if err != nil {
			t.Fatal(err)
		}
		f.Size, f.ETag = info.Size, info.ETag
	}
	put(&small, []byte("ten bytes."))
	put(&large, bytes.Repeat([]byte("x"), size))
	w.add(r, col, small, large)
	w.checkpoint(r, col, 10, 10)
	s := w.create(r, col, "one")

	copyOf := func(partSize int64) *s3.Store {
		o := s3test.Bucket(t)
		o.MultipartThreshold, o.PartSize = 5<<20, partSize
		store := s3test.Open(t, o)
		for info, err := range original.List(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			data, err := object.ReadAll(t.Context(), original, info.Key, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := store.Put(t.Context(), info.Key, data); err != nil {
				t.Fatal(err)
			}
		}
		return store
	}
	r = w.restartOn(r, copyOf(5<<20))
	w.checkOtherLayout(r, s, col, large.Files[0].Path, "3 parts", "2 parts", large.Files[0].ETag)

	r = w.restartOn(r, copyOf(8<<20))
	w.mustComplete(r, restoreSpecOf(s))
}

// TestStoreOfOtherETags uses a store that gives all objects ETags of another layout, as
// after a move to another kind of store.
func TestStoreOfOtherETags(t *testing.T) {
	o := s3test.Bucket(t)
	w, _, _ := onS3(t)
	w.objects = s3test.Open(t, o)
	r := w.start("a")
	col, _, _ := w.collection(r, "c")
	seg := w.segment(r, col, 0, 1, 9)
	w.putFiles(col.ID, &seg)
	w.add(r, col, seg)
	w.checkpoint(r, col, 10, 10)
	s := w.create(r, col, "one")

	o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.OtherETags()).URL()
	r = w.restartOn(r, s3test.Open(t, o))
	w.checkOtherLayout(r, s, col, seg.Files[0].Path, "1 part", seg.Files[0].ETag)
}

// TestCopyConditionIgnoredLater uses a store that stops to honor the condition of copies
// after it was probed, and alters a file. The restore fails by the content of the copy.
func TestCopyConditionIgnoredLater(t *testing.T) {
	for name, parts := range map[string]bool{"whole": false, "in parts": true} {
		t.Run(name, func(t *testing.T) {
			o := s3test.Bucket(t)
			w, _, _ := onS3(t)
			direct := s3test.Open(t, o)
			w.objects = direct
			r := w.start("a")
			col, file, content := w.withLarge(r)
			path := file.Path
			if !parts {
				seg := w.segment(r, col, 0, 1, 9)
				w.putFiles(col.ID, &seg)
				w.add(r, col, seg)
				path, content = seg.Files[0].Path, w.readObject("data/"+seg.Files[0].Path)
			}
			s := w.create(r, col, "one")
			o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.Ignores("X-Amz-Copy-Source-If-Match")).URL()
			r.stop()
			r = w.start("b", throughProxy(s3test.Open(t, o)))
			if _, err := direct.Put(t.Context(), "data/"+path, bytes.ToUpper(content)); err != nil {
				t.Fatal(err)
			}
			w.mustFail(r, restoreSpecOf(s), "SOURCE_OBJECT_ALTERED", path)
		})
	}
}
