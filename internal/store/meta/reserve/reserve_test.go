package reserve_test

import (
	"errors"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/internal/store/meta/reserve"
)

func TestReserveContract(t *testing.T) {
	reserved := func(inner *memory.Store) metatest.Store {
		return metatest.Decorated{KV: reserve.New(inner, func() bool { return false }), Inner: inner}
	}
	metatest.Run(t, func(*testing.T) metatest.Store { return reserved(memory.New(memory.Options{})) })
	inner := memory.New(memory.Options{})
	metatest.Full(t, reserved(inner), func() { inner.SetFull(true) }, func() { inner.SetFull(false) })
}

func TestReserve(t *testing.T) {
	full := false
	kv := reserve.New(memory.New(memory.Options{}), func() bool { return full }, "/mark")
	ctx := t.Context()
	res, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{
		meta.Put("/rec", nil), meta.Put("/name", nil),
		meta.Put("/old", nil),
	}})
	if err != nil {
		t.Fatal(err)
	}
	full = true
	lease, err := kv.Grant(ctx, time.Minute)
	if err != nil {
		t.Errorf("a lease: %v", err)
	}
	rec := meta.Unchanged("/rec", res.Revision)
	for _, c := range []struct {
		name    string
		txn     meta.Txn
		refused bool
	}{
		{"create", meta.Txn{If: []meta.Cond{meta.Absent("/new"), rec}, Then: []meta.Op{
			meta.Put("/new", nil),
			meta.PutLeased("/pending", nil, lease),
		}}, true},
		{"register", meta.Txn{
			If:   []meta.Cond{meta.Absent("/s1"), meta.Absent("/s2")},
			Then: []meta.Op{meta.Put("/s1", nil), meta.Put("/s2", nil)},
		}, true},
		{"register under a claim", meta.Txn{
			If:   []meta.Cond{meta.RangeAbsent("/owner/1", "/owner/5"), rec},
			Then: []meta.Op{meta.Put("/owner/3", nil), meta.Put("/s3", nil)},
		}, true},
		{"drop without pins", meta.Txn{
			If:   []meta.Cond{rec, meta.RangeAbsent("/pin/", "/pin0")},
			Then: []meta.Op{meta.Put("/rec", nil)},
		}, false},
		{"election", meta.Txn{
			If:   []meta.Cond{meta.Absent("/leader")},
			Then: []meta.Op{meta.PutLeased("/leader", nil, lease)}, Else: []meta.Op{meta.Get("/leader")},
		}, false},
		{"a mark", meta.Txn{If: []meta.Cond{meta.Absent("/mark")}, Then: []meta.Op{meta.Put("/mark", nil)}}, false},
		{"grant", meta.Txn{If: []meta.Cond{meta.Absent("/tomb")}, Then: []meta.Op{
			meta.Put("/tomb", nil),
			meta.Delete("/old"),
		}}, false},
		{"drop", meta.Txn{If: []meta.Cond{rec, meta.Absent("/token")}, Then: []meta.Op{
			meta.Put("/rec", nil),
			meta.Put("/token", nil), meta.Delete("/name"),
		}}, false},
		{"change", meta.Txn{If: []meta.Cond{meta.Present("/rec")}, Then: []meta.Op{meta.Put("/rec", nil)}}, false},
		{"look", meta.Txn{
			If: []meta.Cond{meta.Absent("/new")}, Then: []meta.Op{meta.Get("/rec")},
			Else: []meta.Op{meta.Put("/new", nil)},
		}, false},
	} {
		if _, err := kv.Txn(ctx, c.txn); errors.Is(err, meta.ErrNoSpace) != c.refused || err != nil && !c.refused {
			t.Errorf("%s: got error %v, want refused: %v", c.name, err, c.refused)
		}
	}
}
