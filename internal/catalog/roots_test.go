package catalog_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// rooted makes a collection with one root.
func (e *env) rooted(t testing.TB, name, prefix string) error {
	t.Helper()
	s := spec(name)
	s.Roots = []catalog.Root{{Store: "default", Prefix: prefix}}
	_, err := e.CreateCollection(t.Context(), request.Token{}, s)
	return err
}

// testRoots shows that roots of one store are equal or apart.
func testRoots(t *testing.T, kv meta.KV) {
	e := newEnv(t, kv) // with data/
	for i, c := range []struct {
		prefix string
		nested bool
	}{
		{"data/", false},
		{"data/deep/", true},
		{"data/5/1/2/", true},
		{"", true},
		{"data-2/", false},
		{"dat/", false},
		{"data0/a/b/", false},
		{"data0/a/", true},
		{"data0/", true},
		{"data0/a/b/", false},
		{"data0/a/b/c/", true},
		{"data0/a/-/", false},
		{"data0/a-/", false},
	} {
		err := e.rooted(t, fmt.Sprint("r", i), c.prefix)
		if got := errors.Is(err, catalog.ErrRootNested); got != c.nested || !c.nested && err != nil {
			t.Errorf("root %q: %v, want it refused: %v", c.prefix, err, c.nested)
		}
	}
}

// testRootRace makes collections whose roots lie inside each other at once: all that
// are made are equal or apart.
func testRootRace(t *testing.T, kv meta.KV) {
	e := newEnv(t, kv)
	for round := range 5 {
		prefixes := []string{"x%d/", "x%d/1/", "x%d/1/2/", "x%d/"}
		errs := make([]error, len(prefixes))
		var group sync.WaitGroup
		for i, prefix := range prefixes {
			group.Go(func() { errs[i] = e.rooted(t, fmt.Sprintf("n%d-%d", round, i), fmt.Sprintf(prefix, round)) })
		}
		group.Wait()
		made := map[string]bool{}
		for i, err := range errs {
			switch {
			case err == nil:
				made[prefixes[i]] = true
			case !errors.Is(err, catalog.ErrRootNested) && !errors.Is(err, meta.ErrConflict):
				t.Errorf("%s: %v", prefixes[i], err)
			}
		}
		if len(made) != 1 {
			t.Errorf("round %d: %v were made, want one kind: %v", round, made, errs)
		}
	}
}

// testRootReturns shows that a root is free when the last collection with it is gone.
func testRootReturns(t *testing.T, kv meta.KV) {
	e := newEnv(t, kv)
	if err := e.rooted(t, "a", "again/"); err != nil {
		t.Fatal(err)
	}
	col, err := e.DropCollection(t.Context(), request.Token{}, catalog.Ref{DB: "db", Name: "a"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.rooted(t, "b", "again/deep/"); !errors.Is(err, catalog.ErrRootNested) {
		t.Errorf("inside a root of a collection that is being dropped: %v", err)
	}
	dropped, err := e.Collection(t.Context(), catalog.Ref{ID: col})
	if err != nil {
		t.Fatal(err)
	}
	if done, err := e.FinishCollection(t.Context(), &dropped); !done || err != nil {
		t.Fatalf("finished %v, %v", done, err)
	}
	if err := e.rooted(t, "b", "again/deep/"); err != nil {
		t.Errorf("after the collection is gone: %v", err)
	}
}
