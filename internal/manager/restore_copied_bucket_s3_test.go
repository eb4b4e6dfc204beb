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
func (e *env) restartOn(r *testReplica, store object.Store) *testReplica {
	r.stop()
	e.objects = store
	return e.start("b", func(o *testOptions) { o.Stores = map[string]object.Store{"default": store} })
}

// checkOtherLayout checks that the plan of a restore, a restore and a create that verifies
// name the file and report an ETag of another layout.
func (e *env) checkOtherLayout(
	r *testReplica, s *snapshot.Record, col catalog.Collection, path string, parts ...string,
) {
	e.t.Helper()
	parts = append(parts, path, "ETag of another layout", "no checksum was registered")
	check := func(what, text string) {
		for _, part := range parts {
			if !strings.Contains(text, part) {
				e.t.Errorf("%s reports %q, want %q in it", what, text, part)
			}
		}
		if strings.Contains(text, "altered") || strings.Contains(text, "replaced") {
			e.t.Errorf("%s reports of an equal file: %q", what, text)
		}
	}
	sp := restoreSpecOf(s)
	plan, err := r.PlanRestore(e.t.Context(), sp, true)
	if err != nil {
		e.t.Fatal(err)
	}
	check("the plan", strings.Join(plan.Missing, "; "))
	end := e.mustFail(r, sp, "SOURCE_ETAG_LAYOUT", path)
	check("the restore", end.Job.Message)
	verified := spec(col, "verified")
	verified.Verify = true
	_, err = r.Create(e.t.Context(), noToken, verified)
	if !errors.Is(err, ErrFileMissing) {
		e.t.Fatalf("a create that verifies: err = %v", err)
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
	e, _, _ := onS3(t)
	e.objects = original
	r := e.start("a")
	col, _, _ := e.collection(r, "c")
	small, large := e.segment(r, col, 0, 1, 9), e.segment(r, col, 1, 1, 9)
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
	e.add(r, col, small, large)
	e.checkpoint(r, col, 10, 10)
	s := e.create(r, col, "one")

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
	r = e.restartOn(r, copyOf(5<<20))
	e.checkOtherLayout(r, s, col, large.Files[0].Path, "3 parts", "2 parts", large.Files[0].ETag)

	r = e.restartOn(r, copyOf(8<<20))
	e.mustComplete(r, restoreSpecOf(s))
}

// TestStoreOfOtherETags uses a store that gives all objects ETags of another layout, as
// after a move to another kind of store.
func TestStoreOfOtherETags(t *testing.T) {
	o := s3test.Bucket(t)
	e, _, _ := onS3(t)
	e.objects = s3test.Open(t, o)
	r := e.start("a")
	col, _, _ := e.collection(r, "c")
	seg := e.segment(r, col, 0, 1, 9)
	e.putFiles(col.ID, &seg)
	e.add(r, col, seg)
	e.checkpoint(r, col, 10, 10)
	s := e.create(r, col, "one")

	o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.OtherETags()).URL()
	r = e.restartOn(r, s3test.Open(t, o))
	e.checkOtherLayout(r, s, col, seg.Files[0].Path, "1 part", seg.Files[0].ETag)
}

// TestCopyConditionIgnoredLater uses a store that stops to honor the condition of copies
// after it was probed, and alters a file. The restore fails by the content of the copy.
func TestCopyConditionIgnoredLater(t *testing.T) {
	for name, parts := range map[string]bool{"whole": false, "in parts": true} {
		t.Run(name, func(t *testing.T) {
			o := s3test.Bucket(t)
			e, _, _ := onS3(t)
			direct := s3test.Open(t, o)
			e.objects = direct
			r := e.start("a")
			col, file, content := e.withLarge(r)
			path := file.Path
			if !parts {
				seg := e.segment(r, col, 0, 1, 9)
				e.putFiles(col.ID, &seg)
				e.add(r, col, seg)
				path, content = seg.Files[0].Path, e.readObject("data/"+seg.Files[0].Path)
			}
			s := e.create(r, col, "one")
			o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.Ignores("X-Amz-Copy-Source-If-Match")).URL()
			r.stop()
			r = e.start("b", throughProxy(s3test.Open(t, o)))
			if _, err := direct.Put(t.Context(), "data/"+path, bytes.ToUpper(content)); err != nil {
				t.Fatal(err)
			}
			e.mustFail(r, restoreSpecOf(s), "SOURCE_OBJECT_ALTERED", path)
		})
	}
}
