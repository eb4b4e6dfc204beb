package catalog_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// spyKV counts what is read of dropped units and of collections' records, and runs
// before a transaction that registers segments.
type spyKV struct {
	meta.KV
	before  func()
	adds    int
	units   int
	records int
}

func (s *spyKV) Range(ctx context.Context, r meta.Range) (meta.RangeResult, error) {
	res, err := s.KV.Range(ctx, r)
	s.count(res.KVs)
	return res, err
}

func (s *spyKV) count(kvs []meta.KeyValue) {
	for _, kv := range kvs {
		if strings.HasPrefix(kv.Key, keys.AllUnitsPrefix) {
			s.units++
		}
		if strings.HasPrefix(kv.Key, keys.CollectionPrefix) {
			s.records++
		}
	}
}

func (s *spyKV) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpPut && strings.HasPrefix(op.From,
			"/catalog/segment/")
	}) {
		s.adds++
		if before := s.before; before != nil {
			s.before = nil
			before()
		}
	}
	res, err := s.KV.Txn(ctx, t)
	for _, kvs := range res.Ranges {
		s.count(kvs)
	}
	return res, err
}

// Segments whose ids lie far apart are registered without a look at what was dropped
// in between, and drops of that do not disturb it.
func TestScatteredIDs(t *testing.T) {
	kv := &spyKV{KV: memory.New(memory.Options{})}
	e := newEnv(t, kv)
	low := e.ids(t, 1)
	between := e.ids(t, 4000)
	high := e.ids(t, 1)
	dropped := between[1500:1600]
	e.add(t, dropped...)
	if _, err := e.DropSegments(t.Context(), e.ref, dropped[1:]); err != nil {
		t.Fatal(err)
	}
	kv.adds, kv.units = 0, 0
	kv.before = func() {
		if _, err := open(kv.KV).DropSegments(t.Context(), e.ref, dropped[:1]); err != nil {
			t.Error(err)
		}
	}
	e.add(t, low[0], high[0])
	if kv.adds != 1 || kv.units != 0 || kv.before != nil {
		t.Errorf("%d transactions, %d dropped units were read", kv.adds, kv.units)
	}
	// What was dropped itself is still refused.
	if _, _, err := e.AddSegments(t.Context(), e.col.ID, e.segments([]int64{dropped[5]})); err == nil {
		t.Error("a dropped id was registered again")
	}
}

// Listing a database reads none of the records of others.
func TestListOfADatabaseReadsOnlyIt(t *testing.T) {
	kv := &spyKV{KV: memory.New(memory.Options{})}
	c := open(kv)
	for i, db := range []string{"a", "a", "a", "a", "b", "a", "a", "b"} {
		s := spec("c" + string(rune('0'+i)))
		s.DB = db
		if _, err := c.CreateCollection(t.Context(), request.Token{}, s); err != nil {
			t.Fatal(err)
		}
	}
	kv.records = 0
	list, more, err := c.ListCollections(t.Context(), catalog.ListFilter{DB: "b"}, 0, 10)
	if err != nil || more || len(list) != 2 || list[0].Name != "c4" || list[1].Name != "c7" || kv.records != 2 {
		t.Errorf("%d collections, %v, %v; %d records were read", len(list), more, err, kv.records)
	}
}

// Segments whose ids lie in many blocks of ids are registered in one call, as those
// are whose ids follow each other.
func TestIDsOfManyBlocks(t *testing.T) {
	const segments, apart = 200, 5000
	e := newEnv(t, memory.New(memory.Options{}))
	got, err := e.AllocateIDs(t.Context(), request.Token{}, segments*apart)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]int64, segments)
	for i := range ids {
		ids[i] = got.First + int64(i)*apart
	}
	e.add(t, ids...)
	if scanned := e.scan(t, 0); !slices.Equal(scanned, ids) {
		t.Errorf("%d segments are there", len(scanned))
	}
}
