package metatest

import (
	"slices"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Backup returns the content of a backup of kv: all keys except those under a lease, which
// end with a restore.
func Backup(t testing.TB, kv meta.KV) []meta.KeyValue {
	t.Helper()
	res, err := kv.Range(t.Context(), meta.Range{From: "/", To: "0"})
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(res.KVs, func(kv meta.KeyValue) bool { return kv.Lease != 0 })
}

// Restore writes a backup to the empty kv, and then raises its revision to at least
// revision.
func Restore(t testing.TB, kv meta.KV, backup []meta.KeyValue, revision int64) {
	t.Helper()
	write := func(ops ...meta.Op) int64 {
		res, err := kv.Txn(t.Context(), meta.Txn{Then: ops})
		if err != nil {
			t.Fatal(err)
		}
		return res.Revision
	}
	var ops []meta.Op
	for _, kv := range backup {
		ops = append(ops, meta.Put(kv.Key, kv.Value))
	}
	for part := range slices.Chunk(ops, 32) {
		write(part...)
	}
	for at := int64(0); at < revision; {
		at = write(meta.Put("/restored", nil))
	}
	write(meta.Delete("/restored"))
}
