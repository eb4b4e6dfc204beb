// Package reserve keeps space in a metadata store for the operations that free space.
//
// An etcd at its quota accepts deletes, but no puts and no leases. A drop of a snapshot or a
// collection is a put: it changes a record, and the later deletes depend on that record.
// Deletes need a leader, whose election needs a lease. So a full store could never be
// emptied through snapshotd.
//
// Therefore snapshotd has a lower quota than etcd, from which on it refuses transactions
// that grow the store, with the same [meta.ErrNoSpace]:
//
//	used                        | growing transactions | all others, leases
//	below snapshotd's quota     | accepted             | accepted
//	from there to etcd's quota  | refused              | accepted
//	at etcd's quota             | refused              | refused by etcd, except deletes
//
// A transaction grows the store if it puts a key without a lease that it compares as absent,
// individually or in a range, and deletes no key: creations of collections, segments,
// snapshots and restores do so. A drop, an expiry, a grant, a compaction swap and the end of
// a create delete a key in addition to their puts. A change of a record compares it as present.
// Leaders, workers and pins with an expiry are put under leases. All of these are accepted,
// and what they add is small or temporary.
//
// The reserve applies to all callers: a refused transaction wrote nothing, and may be
// repeated after space was freed.
package reserve

import (
	"context"
	"fmt"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// KV is a [meta.KV] that keeps a reserve.
type KV struct {
	meta.KV

	full   func() bool
	exempt []string
}

// New returns kv with a reserve. full reports whether only the reserve is left. A put of an
// exempt key does not count as growth.
func New(kv meta.KV, full func() bool, exempt ...string) *KV {
	return &KV{KV: kv, full: full, exempt: exempt}
}

// Txn implements [meta.KV].
func (k *KV) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if k.full() && k.grows(t) {
		return meta.TxnResult{}, fmt.Errorf("transaction: %w: the rest is reserved for drops and deletes", meta.ErrNoSpace)
	}
	return k.KV.Txn(ctx, t)
}

// grows reports whether a transaction permanently grows the store.
func (k *KV) grows(t meta.Txn) bool {
	if slices.ContainsFunc(t.Then, func(op meta.Op) bool { return op.Kind == meta.OpDelete }) {
		return false
	}
	return slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpPut && op.Lease == 0 && !slices.Contains(k.exempt, op.From) &&
			slices.ContainsFunc(t.If, func(c meta.Cond) bool { return requiresAbsent(c) && meta.InRange(op.From, c.From, c.To) })
	})
}

// requiresAbsent reports whether a compare holds only for missing keys.
func requiresAbsent(c meta.Cond) bool { return c.Op == meta.Equal && c.Revision == 0 }
