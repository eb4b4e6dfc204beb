//go:build linux && !short

package manager

import (
	"bytes"
	"context"
	"fmt"
	"regexp"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// withLarge makes a collection with small files and one that is copied in two parts,
// and returns its content.
func (e *env) withLarge(r *testReplica) (catalog.Collection, segment.File, []byte) {
	e.t.Helper()
	col := e.richCollection(r, "c", 4)
	large := e.segment(r, col, 0, 1, 9)
	f := &large.Files[0]
	f.Size = object.MinPartSize + 1
	f.Path = catalog.NativePath(col.ID, &large, f)
	content := bytes.Repeat([]byte("0123456789abcdef"), object.MinPartSize/16+1)[:f.Size]
	info, err := e.objects.Put(e.t.Context(), "data/"+f.Path, content)
	if err != nil {
		e.t.Fatal(err)
	}
	f.ETag = info.ETag
	e.add(r, col, large)
	return col, *f, content
}

// throughProxy makes a replica copy large files in parts, one after the other.
func throughProxy(through object.Store) func(*testOptions) {
	return func(o *testOptions) {
		o.Stores, o.KV, o.Parts.CopyInFlight = map[string]object.Store{"default": through}, smallParts{o.KV}, 1
	}
}

// onPatientS3 is onS3 with requests that do not time out during a test.
func onPatientS3(t *testing.T) (*env, object.Store, *s3fault.Proxy) {
	t.Helper()
	o := s3test.Bucket(t)
	direct := s3test.Open(t, o)
	if _, err := direct.Put(t.Context(), "keep/bucket", nil); err != nil {
		t.Fatal(err)
	}
	proxy := s3fault.New(t, o.Endpoint)
	o.Endpoint, o.RequestTimeout, o.Backoff = proxy.URL(), clusterPatience, time.Millisecond
	kv := metamemory.New(metamemory.Options{})
	return &env{t: t, kv: kv, memory: kv, objects: direct, now: time.Now}, s3test.Open(t, o), proxy
}

// TestSourceChangesDuringCopy replaces or deletes a file of the snapshot between the
// requests of its copy. The restore fails without remains, or completes with the
// original content.
func TestSourceChangesDuringCopy(t *testing.T) {
	for how, c := range map[string]struct {
		change func(e *env, key string, content []byte) error
		reason string
	}{
		"replaced": {func(e *env, key string, content []byte) error {
			_, err := e.objects.Put(context.Background(), key, bytes.ToUpper(content))
			return err
		}, "SOURCE_OBJECT_ALTERED"},
		"deleted": {func(e *env, key string, _ []byte) error {
			return e.objects.Delete(context.Background(), key)
		}, "SOURCE_OBJECT_MISSING"},
	} {
		for _, after := range []struct {
			op   s3fault.Op
			skip int
			late bool // everything may be copied before
		}{
			{s3fault.HeadObject, 0, false}, {s3fault.CreateMultipartUpload, 0, false}, {s3fault.UploadPartCopy, 1, true},
		} {
			t.Run(fmt.Sprintf("%s after %s", how, after.op), func(t *testing.T) {
				e, through, proxy := onPatientS3(t)
				r := e.start("a", throughProxy(through))
				col, file, content := e.withLarge(r)
				s := e.create(r, col, "one")
				key := "data/" + file.Path
				before := e.contents()
				rule := s3fault.Rule{Op: after.op, Skip: after.skip, Action: s3fault.Edit("change", func(*s3fault.Answer) bool {
					if err := c.change(e, key, content); err != nil {
						t.Error(err)
					}
					return true
				})}
				if after.op == s3fault.HeadObject {
					rule.Key = regexp.MustCompile(regexp.QuoteMeta(file.Path) + "$")
				}
				proxy.Plan(rule)
				sp := restoreSpecOf(s)
				end := e.waitEnded(r, e.restore(r, sp).ID)
				proxy.MustHaveFired(t)
				proxy.Plan()
				if _, err := e.objects.Put(t.Context(), key, content); err != nil {
					t.Fatal(err)
				}
				switch {
				case after.late && end.Job.State == copyjob.Completed:
					e.checkRestored(r, before, end.Job, sp)
				case end.Job.State == copyjob.Failed && end.Job.Reason == c.reason:
					e.checkNoTraces(before)
				default:
					t.Errorf("it ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
				}
				if n, err := e.objects.AbortUploads(t.Context(), "", time.Time{}); err != nil || n != 0 {
					t.Errorf("%d uploads are open, err = %v", n, err)
				}
			})
		}
	}
}

// TestWrongHeadResponses returns HEAD responses with a wrong size or status for a
// snapshot's file. A create with verify rejects a visible difference; a restore detects
// the others and leaves nothing.
func TestWrongHeadResponses(t *testing.T) {
	e, through, proxy := onPatientS3(t)
	// A create retries unusable responses until its own timeout.
	r := e.start("a", throughProxy(through), func(o *testOptions) { o.CreateTimeout = 5 * time.Second })
	col, file, content := e.withLarge(r)
	of := regexp.MustCompile(regexp.QuoteMeta(file.Path) + "$")
	respond := func(name string, edit func(a *s3fault.Answer)) {
		proxy.Plan(s3fault.Rule{
			Op: s3fault.HeadObject, Key: of, Times: -1,
			Action: s3fault.Edit(name, func(a *s3fault.Answer) bool { edit(a); return true }),
		})
	}
	sp := spec(col, "verified")
	sp.Verify = true
	for name, c := range map[string]struct {
		edit func(a *s3fault.Answer)
		want error
	}{
		"size": {func(a *s3fault.Answer) { a.Header.Set("Content-Length", "7") }, ErrFileMissing},
		// A HEAD without a body is ambiguous, so a GET follows.
		"missing": {func(a *s3fault.Answer) { a.Status = 404 }, ErrCreateAborted},
	} {
		respond(name, c.edit)
		_, err := r.Create(t.Context(), request.Token{}, sp)
		proxy.MustHaveFired(t)
		wantError(t, err, c.want)
	}
	proxy.Plan()
	s, err := r.Create(t.Context(), request.Token{}, sp)
	if err != nil {
		t.Fatal(err)
	}

	if err := e.objects.Delete(t.Context(), "data/"+file.Path); err != nil {
		t.Fatal(err)
	}
	respond("there", func(a *s3fault.Answer) {
		a.Status = 200
		a.Header.Set("Content-Length", fmt.Sprint(len(content)))
		a.Header.Set("ETag", `"`+file.ETag+`"`)
		a.Header.Set("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
	})
	sp.Name = "gone"
	if _, err := r.Create(t.Context(), request.Token{}, sp); err != nil {
		t.Errorf("the difference is not visible: %v", err)
	}
	proxy.MustHaveFired(t)
	before := e.contents()
	restore := restoreSpecOf(s)
	end := e.waitEnded(r, e.restore(r, restore).ID)
	if end.Job.Reason != "SOURCE_OBJECT_MISSING" {
		t.Errorf("%+v", end.Job)
	}
	proxy.Plan()
	e.checkNoTraces(before)
}
