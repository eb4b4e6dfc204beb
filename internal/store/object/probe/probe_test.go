package probe_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// wantGood checks the reports of a faultless store, and that nothing is left.
func wantGood(t *testing.T, s object.Store, dir string, optional ...string) {
	t.Helper()
	for name, run := range map[string]runFunc{"Run": probe.Run, "Light": probe.Light} {
		report, err := run(t.Context(), s, dir)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if len(report.Checks) < 6 {
			t.Errorf("%s: only %v", name, report.Checks)
		}
		for _, c := range report.Checks {
			if missing := len(optional) > 0 && strings.HasPrefix(c.Name, optional[0]); c.OK == missing {
				t.Errorf("%s: %+v", name, c)
			}
		}
		if got, want := report.Features(), (probe.Features{ConditionalCopy: true, MultipartCopy: true}); got != want {
			t.Errorf("%s: features %+v, want %+v", name, got, want)
		}
		if n, err := s.AbortUploads(t.Context(), "", time.Time{}); n != 0 || err != nil {
			t.Errorf("%s: left %d uploads, %v", name, n, err)
		}
		wantEmpty(t, s)
	}
}

// runFunc is probe.Run or probe.Light.
type runFunc = func(context.Context, object.Store, string) (probe.Report, error)

func wantEmpty(t *testing.T, s object.Store) {
	t.Helper()
	for info, err := range s.List(t.Context(), "") {
		t.Errorf("left: %+v, %v", info, err)
	}
}

func TestMemory(t *testing.T) {
	wantGood(t, memory.New(memory.Options{}), "")
	wantGood(t, memory.New(memory.Options{}), "some/dir")
}

func TestFile(t *testing.T) {
	s, err := file.Open(t.TempDir(), file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	wantGood(t, s, "")
}

// faulty is a store with one wrong behaviour.
type faulty struct {
	object.Store
	create func(ctx context.Context, key string, body []byte) (object.Info, error)
	copy   func(r object.CopyRequest) (object.CopyRequest, error)
	now    time.Duration
	delete bool
}

func (l *faulty) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if l.copy != nil {
		var err error
		if r, err = l.copy(r); err != nil {
			return object.Info{}, err
		}
	}
	return l.Store.Copy(ctx, r)
}

func (l *faulty) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	if l.create != nil {
		return l.create(ctx, key, body)
	}
	return l.Store.Create(ctx, key, body)
}

func (l *faulty) Now(ctx context.Context) (time.Time, error) {
	now, err := l.Store.Now(ctx)
	return now.Add(l.now), err
}

func (l *faulty) Delete(ctx context.Context, keys ...string) error {
	if l.delete && len(keys) == 1 {
		return nil
	}
	return l.Store.Delete(ctx, keys...)
}

func TestMissing(t *testing.T) {
	plain := memory.New(memory.Options{})
	for name, c := range map[string]struct {
		store    *faulty
		required bool
	}{
		"conditional create":          {&faulty{Store: plain, create: plain.Put}, true},
		"list after write and delete": {&faulty{Store: plain, delete: true}, true},
		"clock":                       {&faulty{Store: plain, now: time.Hour}, false},
	} {
		for _, run := range []runFunc{probe.Run, probe.Light} {
			report, err := run(t.Context(), c.store, "")
			if errors.Is(err, probe.ErrMissing) != c.required || c.required && !strings.Contains(err.Error(), name) {
				t.Errorf("%s: err = %v", name, err)
			}
			found := false
			for _, check := range report.Checks {
				found = found || check.Name == name && !check.OK && check.Detail != ""
			}
			if !found {
				t.Errorf("%s: %+v", name, report)
			}
		}
		wantEmpty(t, plain)
	}
}

// TestFeatures removes each feature in turn.
func TestFeatures(t *testing.T) {
	plain := memory.New(memory.Options{})
	refused := fmt.Errorf("copy: %w", object.ErrMisconfigured)
	current := func(r object.CopyRequest) object.CopyRequest { // the condition is ignored
		if info, err := plain.Head(context.Background(), r.From); err == nil {
			r.SourceETag = info.ETag
		}
		return r
	}
	inParts := func(r object.CopyRequest) bool { return r.Parts.Threshold == 1 }
	inRanges := func(r object.CopyRequest) bool { return r.Size > object.MinPartSize }
	for name, c := range map[string]struct {
		copy          func(r object.CopyRequest) (object.CopyRequest, error)
		run, light    probe.Features
		detail, check string
	}{
		"no condition": {
			copy:   func(r object.CopyRequest) (object.CopyRequest, error) { return current(r), nil },
			detail: "x-amz-copy-source-if-match", check: "conditional copy",
		},
		"no condition on parts": {
			copy: func(r object.CopyRequest) (object.CopyRequest, error) {
				if inParts(r) {
					r = current(r)
				}
				return r, nil
			},
			run: probe.Features{ConditionalCopy: true}, light: probe.Features{ConditionalCopy: true},
			detail: "x-amz-copy-source-if-match", check: "multipart copy",
		},
		"no copies": {
			copy:   func(r object.CopyRequest) (object.CopyRequest, error) { return r, refused },
			detail: "misconfigured", check: "conditional copy",
		},
		"no parts": {
			copy: func(r object.CopyRequest) (object.CopyRequest, error) {
				if inParts(r) {
					return r, refused
				}
				return r, nil
			},
			run: probe.Features{ConditionalCopy: true}, light: probe.Features{ConditionalCopy: true},
			detail: "misconfigured", check: "multipart copy",
		},
		"no ranges": {
			copy: func(r object.CopyRequest) (object.CopyRequest, error) {
				if inRanges(r) {
					return r, refused
				}
				return r, nil
			},
			run: probe.Features{ConditionalCopy: true}, light: probe.Features{ConditionalCopy: true, MultipartCopy: true},
			detail: "misconfigured", check: "multipart copy of ranges",
		},
		"everything refused": {
			copy: func(r object.CopyRequest) (object.CopyRequest, error) {
				return r, fmt.Errorf("copy: %w", object.ErrSourceChanged)
			},
			detail: "was refused", check: "conditional copy",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &faulty{Store: plain, copy: c.copy}
			report, err := probe.Run(t.Context(), s, "")
			if err != nil || report.Features() != c.run {
				t.Errorf("Run: %+v, %v, want %+v", report.Features(), err, c.run)
			}
			found := false
			for _, check := range report.Checks {
				found = found || check.Name == c.check && !check.OK && !check.Required && strings.Contains(check.Detail, c.detail)
			}
			if !found {
				t.Errorf("no failed check %q with %q: %+v", c.check, c.detail, report.Checks)
			}
			report, err = probe.Light(t.Context(), s, "")
			if err != nil || report.Features() != c.light {
				t.Errorf("Light: %+v, %v, want %+v", report.Features(), err, c.light)
			}
			wantEmpty(t, plain)
		})
	}
	if got := (probe.Report{}).Features(); got != (probe.Features{}) {
		t.Errorf("empty report: %+v", got)
	}
}

// TestEveryFault fails each call in turn. The probe must then report an incomplete check,
// and never a missing property. If the clean-up fails, the probe passes, and RemoveLeft
// removes the leftovers.
func TestEveryFault(t *testing.T) {
	plain := memory.New(memory.Options{})
	for n := 0; ; n++ {
		f := object.NewFaulty(plain)
		cleaning := false
		var mu sync.Mutex
		f.Plan(func(c object.Call) object.Fault {
			mu.Lock()
			defer mu.Unlock()
			if c.N != n {
				return object.FaultNone
			}
			cleaning = c.Op == object.OpDelete && len(c.Keys) > 20 // more than any check deletes
			return object.FaultBefore
		})
		report, err := probe.Light(t.Context(), f, "")
		if f.Fired() == 0 {
			if err != nil || n < 15 {
				t.Errorf("after %d calls: %v", n, err)
			}
			return
		}
		if errors.Is(err, probe.ErrMissing) {
			t.Errorf("call %d: %v", n, err)
		}
		good, unknown := err == nil, false
		for _, c := range report.Checks {
			good, unknown = good && c.OK, unknown || c.Unknown
		}
		if good != cleaning {
			t.Errorf("call %d failed, of the clean-up: %v; the probe passed: %v", n, cleaning, good)
		}
		clockFailed := func(c probe.Check) bool { return c.Name == "clock" && !c.OK }
		if !good && err == nil && !unknown && !slices.ContainsFunc(report.Checks, clockFailed) {
			t.Errorf("call %d failed, and no check is unknown: %+v", n, report.Checks)
		}
		if cleaning {
			objects, bytes, _, err := probe.RemoveLeft(t.Context(), plain, time.Now().Add(25*time.Hour))
			if err != nil || objects == 0 || bytes == 0 {
				t.Errorf("removed %d objects of %d bytes, %v", objects, bytes, err)
			}
		}
		wantEmpty(t, plain)
	}
}

// Leftovers of a dead probe are removed after a day; other objects stay.
func TestRemoveLeft(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	store := memory.New(memory.Options{Now: func() time.Time { return now }})
	names := []string{
		"snapshotd-probe/abcdefghijklmnopqrstuvwxyz/trip", "snapshotd-probe/abcdefghijklmnopqrstuvw234/a/b",
		"snapshotd-probe/x", "snapshotd-probe/abcdefghijklmnopqrstuvwxyz0/x", "snapshotd-probe/README/x",
		"data/abcdefghijklmnopqrstuvwxyz/trip",
	}
	for _, name := range names {
		if _, err := store.Put(t.Context(), name, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (list []string) {
		if _, _, _, err := probe.RemoveLeft(t.Context(), store, now); err != nil {
			t.Fatal(err)
		}
		for info, err := range store.List(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, info.Key)
		}
		return list
	}
	slices.Sort(names)
	now = now.Add(23 * time.Hour)
	if got := left(); !slices.Equal(got, names) {
		t.Errorf("before a day has passed: %v", got)
	}
	now = now.Add(2 * time.Hour)
	want := slices.DeleteFunc(names, func(name string) bool {
		return strings.HasSuffix(name, "z/trip") && strings.HasPrefix(name, probe.Dir) || strings.HasSuffix(name, "/a/b")
	})
	if got := left(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestDistantStore probes a store with a latency of 200 ms.
func TestDistantStore(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		f := object.NewFaulty(memory.New(memory.Options{Now: time.Now}))
		f.SetLatency(200 * time.Millisecond)
		began := time.Now()
		if _, err := probe.Light(t.Context(), f, ""); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

// TestIncompleteCheck shows that a required check that ends in an error is neither passed
// nor missing: the report has its error.
func TestIncompleteCheck(t *testing.T) {
	plain := memory.New(memory.Options{})
	unavailable := fmt.Errorf("put: %w", object.ErrUnavailable)
	s := &faulty{Store: plain, create: func(context.Context, string, []byte) (object.Info, error) {
		return object.Info{}, unavailable
	}}
	report, err := probe.Run(t.Context(), s, "")
	if !errors.Is(err, object.ErrUnavailable) || errors.Is(err, probe.ErrMissing) {
		t.Errorf("err = %v, want ErrUnavailable and not ErrMissing", err)
	}
	if report.Err() == nil || !report.Made() {
		t.Errorf("report: %v, made %v", report.Err(), report.Made())
	}
	for _, c := range report.Checks {
		if c.Name == "conditional create" && (c.OK || c.Err == nil || c.Detail != unavailable.Error()) {
			t.Errorf("%+v, want the error", c)
		}
	}
}
