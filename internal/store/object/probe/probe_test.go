package probe_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
)

// wantGood checks a report of a store without fault, and that nothing is left.
func wantGood(t *testing.T, s object.Store, dir string, optional ...string) {
	t.Helper()
	for name, run := range map[string]func(context.Context, object.Store, string) (probe.Report, error){"Run": probe.Run, "Light": probe.Light} {
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
		wantEmpty(t, s)
	}
}

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

// liar is a store that does one thing wrong.
type liar struct {
	object.Store
	create func(ctx context.Context, key string, body []byte) (object.Info, error)
	now    time.Duration
	delete bool
}

func (l *liar) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	if l.create != nil {
		return l.create(ctx, key, body)
	}
	return l.Store.Create(ctx, key, body)
}

func (l *liar) Now(ctx context.Context) (time.Time, error) {
	now, err := l.Store.Now(ctx)
	return now.Add(l.now), err
}

func (l *liar) Delete(ctx context.Context, keys ...string) error {
	if l.delete && len(keys) == 1 {
		return nil
	}
	return l.Store.Delete(ctx, keys...)
}

func TestMissing(t *testing.T) {
	plain := memory.New(memory.Options{})
	for name, c := range map[string]struct {
		store    *liar
		required bool
	}{
		"conditional create":          {&liar{Store: plain, create: plain.Put}, true},
		"list after write and delete": {&liar{Store: plain, delete: true}, true},
		"clock":                       {&liar{Store: plain, now: time.Hour}, false},
	} {
		for _, run := range []func(context.Context, object.Store, string) (probe.Report, error){probe.Run, probe.Light} {
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

// TestEveryFault fails each call in turn. A probe must then say so, and never
// that something is missing.
func TestEveryFault(t *testing.T) {
	plain := memory.New(memory.Options{})
	for n := 0; ; n++ {
		f := object.NewFaulty(plain)
		f.FailNth("", n, object.FaultBefore)
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
		good := err == nil
		for _, c := range report.Checks {
			good = good && c.OK
		}
		if good {
			t.Errorf("call %d failed and nobody noticed", n)
		}
		if err != nil && strings.Contains(err.Error(), "clean up") {
			for info, err := range plain.List(t.Context(), "") {
				if err != nil {
					t.Fatal(err)
				}
				if err := plain.Delete(t.Context(), info.Key); err != nil {
					t.Fatal(err)
				}
			}
		}
		wantEmpty(t, plain)
	}
}
