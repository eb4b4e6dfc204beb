//go:build linux && !short

package manager

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/etcdtest"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// onS3 is a env in real time with objects on a real S3 server. Checks access it
// directly; replicas through the fault proxy.
func onS3(t *testing.T) (*env, object.Store, *s3fault.Proxy) {
	t.Helper()
	return onS3For(t, 30*time.Second) // a busy machine is slow
}

// onS3For is onS3 with a request timeout.
func onS3For(t *testing.T, timeout time.Duration) (*env, object.Store, *s3fault.Proxy) {
	t.Helper()
	o := s3test.Bucket(t)
	direct := s3test.Open(t, o)
	// The server stores a bucket as a directory, and sometimes removes one that
	// became empty together with the last object's.
	if _, err := direct.Put(t.Context(), "keep/bucket", nil); err != nil {
		t.Fatal(err)
	}
	proxy := s3fault.New(t, o.Endpoint)
	o.Endpoint, o.RequestTimeout, o.MaxAttempts, o.Backoff = proxy.URL(), timeout, 2, time.Millisecond
	kv := metamemory.New(metamemory.Options{})
	return &env{t: t, kv: kv, memory: kv, objects: direct, now: time.Now}, s3test.Open(t, o), proxy
}

func TestS3Lifecycle(t *testing.T) {
	e, through, proxy := onS3(t)
	e.kv, e.memory = etcdtest.Shared(t).KV(t), nil
	r := e.start("a", func(o *testOptions) { o.Stores = map[string]object.Store{"default": through} })
	col, _, _ := e.collection(r, "c")
	for i := range 20 {
		s := e.segment(r, col, i%2, 1, 20)
		if _, err := e.objects.Put(t.Context(), "data/"+s.Files[0].Path, []byte("ten bytes.")); err != nil {
			t.Fatal(err)
		}
		e.add(r, col, s)
	}
	e.checkpoint(r, col, 10, 30)
	sp := spec(col, "one")
	sp.Verify = true
	s, err := r.Create(t.Context(), request.Token{}, sp)
	if err != nil || s.Totals.Segments != 20 || s.Totals.Straddling != 10 {
		t.Fatalf("%+v, err = %v", s, err)
	}
	before := len(proxy.Events())
	e.create(r, col, "two")
	if n := len(proxy.Events()) - before; n != 3 {
		t.Errorf("a snapshot of one manifest took %d requests, want 3", n)
	}
	e.check(r)
	for _, name := range []string{"one", "two"} {
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: name}, 0); err != nil {
			t.Fatal(err)
		}
	}
	e.await("both are removed", func() bool { return len(e.keysUnder("/snapshot/")) == 0 })
	e.check(r)
}

// TestS3FaultsAtEachRequest makes each fault at each request of a create and the drop
// of its snapshot, once and permanently. The create ends COMMITTED with correct
// content, or with an error and no remains once the fault is over; the drop continues
// later.
func TestS3FaultsAtEachRequest(t *testing.T) {
	for name, action := range map[string]s3fault.Action{
		"SlowDown":      s3fault.Status(503, "SlowDown"),
		"500":           s3fault.Status(500, "InternalError"),
		"AccessDenied":  s3fault.Status(403, "AccessDenied"),
		"NoSuchBucket":  s3fault.Status(404, "NoSuchBucket"),
		"skewed":        s3fault.Status(403, "RequestTimeTooSkewed"),
		"wrong region":  s3fault.StatusWith(301, "PermanentRedirect", http.Header{"X-Amz-Bucket-Region": {"eu-test-9"}}),
		"reset":         s3fault.Reset(),
		"lost":          s3fault.Lost(),
		"hang":          s3fault.Hang(),
		"hang after":    s3fault.HangAfter(),
		"error in 200":  s3fault.ErrorIn200("InternalError"),
		"empty 200":     s3fault.Empty200(),
		"HTML in 200":   s3fault.HTML200(),
		"no ETag":       s3fault.StripAnswer("ETag"),
		"slow":          s3fault.Slow(100 * time.Millisecond),
		"not executed":  s3fault.Instead(&s3fault.Answer{Status: 200}),
		"conflict":      s3fault.Status(409, "ConditionalRequestConflict"),
		"precondition":  s3fault.Status(412, "PreconditionFailed"),
		"bad gateway":   s3fault.Instead(&s3fault.Answer{Status: 502, Body: []byte("<html>Bad Gateway</html>")}),
		"expired token": s3fault.Status(400, "ExpiredToken"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, times := range []int{1, -1} {
				skip := 0
				for s3FaultAt(t, action, skip, times) {
					if skip++; skip > 20 {
						t.Fatal("there is no end of requests")
					}
				}
				if skip < 3 { // the writes
					t.Errorf("the fault happened to %d requests only", skip)
				}
			}
		})
	}
}

// s3FaultAt plans one fault and reports whether it occurred.
func s3FaultAt(t *testing.T, action s3fault.Action, skip, times int) bool {
	e, through, proxy := onS3For(t, 300*time.Millisecond)
	name := fmt.Sprintf("request %d, %d times", skip, times)
	r := e.start("a", func(o *testOptions) {
		o.Stores = map[string]object.Store{"default": through}
		o.CleanInterval = 500 * time.Millisecond
		o.CreateTimeout = time.Second // bounds the wait for a store that does not answer
	})
	defer r.stop()
	col, _, _ := e.collection(r, "c")
	e.add(r, col, e.segment(r, col, 0, 1, 2))
	e.checkpoint(r, col, 10, 10)
	// So that no request for the time is counted.
	eventually(t, name+": the leader notes the time", func() bool { return len(e.keysUnder(keys.Clock)) > 0 })
	proxy.Plan(s3fault.Rule{Skip: skip, Times: times, Action: action})
	s, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
	switch {
	case err == nil:
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
			t.Errorf("%s: drop: %v", name, err)
		}
		eventually(t, name+": the fault meets the removal, or that is over", func() bool {
			return proxy.Fired() > 0 || len(e.keysUnder("/snapshot/")) == 0
		})
	case !errors.Is(err, ErrCreateAborted) && !errors.Is(err, object.ErrDenied) &&
		!errors.Is(err, object.ErrMisconfigured):
		t.Errorf("%s: create: %v", name, err)
	}
	fired := proxy.Fired() > 0
	// A write that the create sent at its deadline may reach the store after the
	// removal; the sweep deletes it later, which another test covers.
	proxy.Plan(s3fault.Rule{
		Op: s3fault.PutObject, Key: regexp.MustCompile(`^snapshots/1/5/`), Times: -1, Action: s3fault.Status(503, "SlowDown"),
	})
	eventually(t, name+": all is clean", func() bool { return len(e.keysUnder("/snapshot/")) == 0 })
	if left := e.objectsUnder("snapshots/"); len(left) > 0 {
		t.Errorf("%s: left %v", name, left)
	}
	proxy.Plan()
	// The fault is over: the content is correct.
	e.create(r, col, "x")
	e.check(r)
	return fired
}
