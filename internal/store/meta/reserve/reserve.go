// Package reserve keeps room in a metadata store for what makes room in it.
//
// An etcd that has reached its quota takes deletes, but no put and no lease. To
// drop a snapshot or a collection is a put: its record says so from then on, and
// what goes later goes for that record. And who deletes has to be elected, which
// takes a lease. So a store that is full could never be emptied through snapshotd.
//
// Below etcd's own quota lies therefore one of snapshotd's, from which on it refuses
// by itself what grows the store, with the same [meta.ErrNoSpace]:
//
//	used                        | grows | all else, leases
//	below the quota             | goes  | goes
//	from there to etcd's        | ends  | goes
//	at etcd's                   | ends  | ends, by etcd; deletes alone go
//
// A transaction grows the store when it puts a key that it compares to be absent, by
// itself or with a range, under no lease, and deletes none: collections, segments, snapshots and restores
// begin so. A drop, an expiry, a grant, a compaction swap and what ends a create
// delete a key beside what they put. A change of a record compares it to be there. A
// leader, a worker and a pin with an end are put under leases. All of these go, and
// what they add is small, or ends.
//
// Who asks is not the reserve's business: a transaction that is refused wrote
// nothing, and may be repeated when there is room.
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

// New returns kv with a reserve. full says whether only it is left. Keys that are
// exempt never make a transaction one that grows.
func New(kv meta.KV, full func() bool, exempt ...string) *KV {
	return &KV{KV: kv, full: full, exempt: exempt}
}

// Txn implements [meta.KV].
func (k *KV) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if k.full() && k.grows(t) {
		return meta.TxnResult{}, fmt.Errorf("transaction: %w: what is left is kept for drops and deletes", meta.ErrNoSpace)
	}
	return k.KV.Txn(ctx, t)
}

// grows says whether a transaction adds to the store what stays.
func (k *KV) grows(t meta.Txn) bool {
	if slices.ContainsFunc(t.Then, func(op meta.Op) bool { return op.Kind == meta.OpDelete }) {
		return false
	}
	return slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpPut && op.Lease == 0 && !slices.Contains(k.exempt, op.From) &&
			slices.ContainsFunc(t.If, func(c meta.Cond) bool { return wantsAbsent(c) && meta.InRange(op.From, c.From, c.To) })
	})
}

// wantsAbsent says whether a compare holds for what does not exist alone.
func wantsAbsent(c meta.Cond) bool { return c.Op == meta.Equal && c.Revision == 0 }
