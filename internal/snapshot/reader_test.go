package snapshot_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
)

// goingStore has an object that is altered at the first read and missing at the second.
type goingStore struct {
	object.Store
	reads int
}

func (s *goingStore) Get(
	ctx context.Context, key string, offset, length int64,
) (io.ReadCloser, object.Info, error) {
	if s.reads++; s.reads == 1 {
		return io.NopCloser(strings.NewReader("xx")), object.Info{Size: 2}, nil
	}
	return s.Store.Get(ctx, key, offset, length)
}

// TestMissingAtTheSecondRead checks the error of an object that was altered and then is
// missing: the snapshot was dropped meanwhile, or it is corrupt.
func TestMissingAtTheSecondRead(t *testing.T) {
	for state, want := range map[snapshot.State]error{
		snapshot.Committed: snapshot.ErrCorrupt, snapshot.Deleting: snapshot.ErrExpiredOrDropped,
	} {
		kv := metamemory.New(metamemory.Options{})
		store := &goingStore{Store: objectmemory.New(objectmemory.Options{})}
		s := &snapshot.Record{ID: 7, Collection: 1, Store: "default", State: state, Metadata: manifest.Digest{Length: 2}}
		if _, err := kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
			meta.Put(keys.Snapshot(s.ID), snapshot.Encode(s, "op")),
		}}); err != nil {
			t.Fatal(err)
		}
		r := snapshot.NewReader(snapshot.ReaderOptions{KV: kv, Stores: map[string]object.Store{"default": store}})
		if _, err := r.Metadata(t.Context(), s); !errors.Is(err, want) || store.reads != 2 {
			t.Errorf("%v: got %v after %d reads, want %v", state, err, store.reads, want)
		}
	}
}
