package meta_test

import (
	"errors"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

func TestPrefix(t *testing.T) {
	for _, c := range []struct{ prefix, to string }{
		{"/", "0"},
		{"/a/", "/a0"},
		{"/a\xff", "/b"},
	} {
		from, to := meta.Prefix(c.prefix)
		if from != c.prefix || to != c.to {
			t.Errorf("prefix %q: got [%q, %q), want to %q", c.prefix, from, to, c.to)
		}
		if err := meta.CheckSpan(from, to); err != nil {
			t.Errorf("prefix %q: %v", c.prefix, err)
		}
		for key, want := range map[string]bool{c.prefix: true, c.prefix + "\xff\xff": true, c.to: false, "": false} {
			if got := meta.InRange(key, from, to); got != want {
				t.Errorf("%q below %q: got %v, want %v", key, c.prefix, got, want)
			}
		}
	}
}

// The suite tests the refusals of both stores; this test checks how the limits count.
func TestCheckCountsAllLists(t *testing.T) {
	half := make([]byte, meta.MaxTxnBytes/2)
	txn := meta.Txn{
		If:   []meta.Cond{meta.Absent("/c")},
		Then: []meta.Op{meta.Put("/a", half)},
		Else: []meta.Op{meta.Put("/b", half[6:])},
	}
	if err := txn.Check(); err != nil {
		t.Errorf("at the limit: %v", err)
	}
	txn.If = append(txn.If, meta.Absent("/d"))
	if err := txn.Check(); !errors.Is(err, meta.ErrTooLarge) {
		t.Errorf("over the limit: got error %v", err)
	}
}
