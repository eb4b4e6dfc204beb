// Package meta defines the contract of the small, strongly consistent store for lifecycle,
// catalog and jobs. It does not interpret their records.
//
// [KV] is the subset of etcd that snapshotd uses: reads at one revision, transactions of
// compares and writes, watches that resume from a revision, and leases. Both
// implementations, etcd and memory, pass the suite in metatest, including limits and error
// classes, so that tests with the memory store are valid. [Faulty] decorates either.
//
// An error from a write never proves that the write did not happen; see [KV.Txn].
package meta

import (
	"context"
	"errors"
	"slices"
	"time"
)

// Limits that both implementations enforce. They are etcd's defaults, minus the envelope
// that the client adds.
const (
	// MaxTxnOps bounds each of the three lists of a [Txn]: compares, then, else.
	MaxTxnOps = 128
	// MaxTxnBytes bounds the keys and values of all three lists of one [Txn] together,
	// in bytes.
	MaxTxnBytes = 1_500_000
	// MaxKeyBytes bounds one key. etcd itself has no limit.
	MaxKeyBytes = 1024
)

// Errors for callers to distinguish. Any other error of a [KV] wraps ErrUnavailable, or the
// error of the caller's context if that has ended; the result of a write is then unknown.
// No error carries a gRPC status.
var (
	// ErrUnavailable means that the store sent no response, or an unusable one. A write
	// may have happened.
	ErrUnavailable = errors.New("metadata store unavailable")
	// ErrCompacted means that the requested revision was compacted.
	ErrCompacted = errors.New("revision compacted")
	// ErrWatchBroken means that a watch received a change at or before a revision that
	// was reported as complete. Its batches may lack other changes as well: callers with
	// a copy of the range must read it again.
	ErrWatchBroken = errors.New("watch out of order")
	// ErrTooOld means that the store's servers are of an unsupported release. The
	// request was not sent.
	ErrTooOld = errors.New("metadata store too old")
	// ErrDenied means that the store refused the login or the request. A transaction
	// with this error changed nothing. Retries fail until an operator intervenes.
	ErrDenied = errors.New("metadata store denies access")
	// ErrCorrupt means that the store has detected damage of its data, and serves
	// nothing until an operator repairs it. It is wrapped together with ErrUnavailable.
	ErrCorrupt = errors.New("metadata store found its data damaged")
	// ErrLeaseNotFound means that the lease expired, was revoked, or never existed. A
	// transaction with this error changed nothing.
	ErrLeaseNotFound = errors.New("lease not found")
	// ErrNoSpace means that the store is full: it refuses puts and lease grants, and
	// accepts deletes. A transaction with this error changed nothing.
	ErrNoSpace = errors.New("metadata store is full")
	// ErrTooLarge means that a transaction or a key exceeds a limit of this package. It
	// was not sent, or was refused completely.
	ErrTooLarge = errors.New("transaction too large")
	// ErrInvalid means that the request is malformed: a key that does not begin with a
	// slash, a range that ends before it begins, a key put twice in one transaction. It
	// was not sent.
	ErrInvalid = errors.New("invalid request")
)

// ErrConflict means that concurrent changes broke the preconditions of every attempt at a
// change: nothing was written, and a repeat may succeed. No [KV] returns it.
var ErrConflict = errors.New("too many concurrent changes")

// Refused reports whether a transaction with the error changed nothing, and never will.
func Refused(err error) bool {
	return isOneOf(err, ErrLeaseNotFound, ErrNoSpace, ErrTooLarge, ErrTooOld, ErrDenied, ErrInvalid)
}

// Unusable reports whether err concerns the store and not the request: the store is
// unavailable, full, too old, or denies access. The same request succeeds after the store
// has recovered.
func Unusable(err error) bool {
	return isOneOf(err, ErrUnavailable, ErrNoSpace, ErrTooOld, ErrDenied)
}

func isOneOf(err error, list ...error) bool {
	return slices.ContainsFunc(list, func(e error) bool { return errors.Is(err, e) })
}

// KeyValue is one key at one revision.
type KeyValue struct {
	Key            string
	Value          []byte // nil if empty; readers must not modify it
	CreateRevision int64  // of the last creation of the key
	ModRevision    int64  // of the write of this value
	Lease          LeaseID
}

// LeaseID names a lease. Zero is no lease.
type LeaseID int64

// KV is a strongly consistent key-value store with revisions. Every write increments the
// revision of the whole store. A transaction is one write, or none if it neither puts nor
// deletes. An empty store has revision 1. All methods are safe for concurrent use.
//
// Every key begins with a slash; the range of all keys is from "/" to "0". Values are stored
// unchanged; callers may reuse their slices.
type KV interface {
	// Get returns the value of key at the newest revision, read linearizably, and the
	// store's revision at that moment. For a missing key found is false, and the
	// revision is valid.
	Get(ctx context.Context, key string) (kv KeyValue, found bool, revision int64, err error)

	// Range returns the keys of r in key order, all at one revision: r.Revision if it is
	// positive, else the newest, read linearizably. A compacted revision is an
	// ErrCompacted, a future one an ErrUnavailable. The response is one message: use
	// Scan for ranges without a small bound.
	Range(ctx context.Context, r Range) (RangeResult, error)

	// Scan calls fn with the keys of [from, to) in key order, in batches of bounded
	// size, all at one revision: revision if it is positive, else the newest. It returns
	// that revision. It stops at fn's first error and returns it unchanged. A revision
	// that is compacted before or during the scan is an ErrCompacted; before that and
	// any other error fn may have received a part. fn runs in the calling goroutine,
	// never receives an empty batch, and may keep the batch. A slow fn delays the scan,
	// which then fails only if the revision is compacted meanwhile.
	Scan(ctx context.Context, from, to string, revision int64, fn func([]KeyValue) error) (int64, error)

	// Txn atomically applies t.Then if every compare of t.If holds, else t.Else. The
	// operations run in order, and a get sees earlier operations. After an error other
	// than ErrLeaseNotFound, ErrNoSpace, ErrTooLarge, ErrTooOld, ErrDenied or
	// ErrInvalid, the transaction may have been applied, or be applied later: read back
	// before any decision, and trust the absence of a write only after a transaction
	// that makes the write impossible. Txn never sends a transaction twice.
	//
	// A key may be put at most once in a transaction, and not be deleted in the same;
	// deletes may overlap. Leases are checked in the branch that runs; a full store
	// refuses a transaction with a put in either branch.
	Txn(ctx context.Context, t Txn) (TxnResult, error)

	// Watch reports every change of the keys in [from, to) after revision after, in
	// order, without gaps and without duplicates; after may be a future revision. It
	// does not block, and ends with ctx, which must end to free its resources. Next
	// returns its errors.
	Watch(ctx context.Context, from, to string, after int64) Watcher

	// Grant creates a lease that expires ttl from now unless it is kept alive. A ttl is
	// rounded up to whole seconds; the minimum is one second, and with etcd one and a
	// half election timeouts. A lease never expires early, and may expire late.
	Grant(ctx context.Context, ttl time.Duration) (LeaseID, error)
	// KeepAlive renews a lease once, for its full ttl from now. ErrLeaseNotFound is
	// final.
	KeepAlive(ctx context.Context, id LeaseID) error
	// Revoke ends a lease immediately. As at its expiry, its keys are deleted in one
	// revision. After a nil result no transaction that puts under the lease can take
	// effect. A missing lease is not an error.
	Revoke(ctx context.Context, id LeaseID) error
}

// Range selects the keys of [From, To), or the key From if To is empty. See [Prefix].
type Range struct {
	From, To string
	Revision int64 // 0: the newest
	Limit    int   // 0: none
	KeysOnly bool
}

// RangeResult is the result of a [Range].
type RangeResult struct {
	KVs      []KeyValue
	More     bool  // the limit truncated the result
	Count    int64 // keys in the range, regardless of the limit
	Revision int64 // the store's revision at the time of the response
}

// Watcher is a running watch. Next must not be called concurrently with itself, nor
// Progress.
type Watcher interface {
	// Next waits for the next batch: all changes of one or more whole revisions, or no
	// change and a higher Revision if the store reported its progress. It returns
	// ErrCompacted if the watch cannot continue without a gap, ErrWatchBroken if the
	// store contradicts its reports, ErrDenied if it refuses the range, ErrInvalid for
	// an invalid range, and the context's error after the end of the watch's context. A
	// temporary loss of the store is not an error. ErrUnavailable means that this watch
	// has ended, and that a new one may start after the last revision. After an error
	// Next returns only errors.
	Next() (WatchBatch, error)
	// Progress requests a report, through Next, of the revision up to which this watch
	// is complete. The store may drop the request, as etcd does while the watch catches
	// up: repeat it.
	Progress(ctx context.Context) error
}

// WatchBatch is a step of a watch.
type WatchBatch struct {
	Events []Event // ordered by revision; unordered within a revision
	// Revision is greater than that of the previous batch. All changes at or before it
	// have been delivered.
	Revision int64
}

// Event is one change of one key. For any kind of delete KV has the key and, as
// ModRevision, the revision of the delete.
type Event struct {
	Deleted bool
	KV      KeyValue
}

// Txn is a transaction of compares and operations.
type Txn struct {
	// Name is the step of a protocol that the transaction makes, as an operation, a
	// dot and the step: "create.commit". Decorators of a [KV] match it: faults,
	// metrics, crash points. It is never stored and may be empty.
	Name string

	If   []Cond
	Then []Op
	Else []Op
}

// TxnResult is the result of an executed [Txn].
type TxnResult struct {
	Succeeded bool  // all compares held
	Revision  int64 // of the transaction if it wrote, else the newest
	// Ranges has the results of the gets of the executed branch, in order.
	Ranges [][]KeyValue
}

// Cond is a compare on a key, or on each key of a range. A missing key and an empty range
// compare like one key with revisions 0, so that [RangeAbsent] holds for them. The zero Cond
// is invalid; use the constructors.
type Cond struct {
	From, To string
	Target   Target
	Op       Compare
	Revision int64
}

// Target is the revision that a [Cond] compares.
type Target int

// The targets.
const (
	CreateRevision Target = iota + 1
	ModRevision
)

// Compare is the comparison of a [Cond].
type Compare int

// The comparisons.
const (
	Equal Compare = iota + 1
	Less
	Greater
)

// Absent holds while key does not exist.
func Absent(key string) Cond {
	return Cond{From: key, Target: CreateRevision, Op: Equal}
}

// Present holds while key exists.
func Present(key string) Cond {
	return Cond{From: key, Target: CreateRevision, Op: Greater}
}

// RangeAbsent holds while no key of [from, to) exists.
func RangeAbsent(from, to string) Cond {
	return Cond{From: from, To: to, Target: CreateRevision, Op: Equal}
}

// Unchanged holds while key exists and was last written at revision mod.
func Unchanged(key string, mod int64) Cond {
	return Cond{From: key, Target: ModRevision, Op: Equal, Revision: mod}
}

// SameKey holds while key is the one created at revision create, regardless of later puts.
// It does not hold for a key that was deleted and created again.
func SameKey(key string, create int64) Cond {
	return Cond{From: key, Target: CreateRevision, Op: Equal, Revision: create}
}

// Op is one step of a transaction's branch. Use the constructors.
type Op struct {
	Kind     OpKind
	From, To string
	Value    []byte
	Lease    LeaseID
}

// OpKind is the kind of an [Op].
type OpKind int

// The kinds of operation.
const (
	OpPut OpKind = iota + 1
	OpDelete
	OpGet
)

// Put writes key without a lease.
func Put(key string, value []byte) Op { return Op{Kind: OpPut, From: key, Value: value} }

// PutLeased writes key, which is deleted at the end of the lease.
func PutLeased(key string, value []byte, lease LeaseID) Op {
	return Op{Kind: OpPut, From: key, Value: value, Lease: lease}
}

// Delete removes key; a missing key is not an error.
func Delete(key string) Op { return Op{Kind: OpDelete, From: key} }

// DeleteRange removes all keys of [from, to).
func DeleteRange(from, to string) Op { return Op{Kind: OpDelete, From: from, To: to} }

// Get reads key.
func Get(key string) Op { return Op{Kind: OpGet, From: key} }

// GetRange reads the keys of [from, to).
func GetRange(from, to string) Op { return Op{Kind: OpGet, From: from, To: to} }

// Prefix returns the range of all keys that begin with prefix, which must not
// be empty and, by the convention of this project, ends in "/".
func Prefix(prefix string) (from, to string) {
	end := []byte(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return prefix, string(end[:i+1])
		}
	}
	panic("meta: prefix without an end: " + prefix)
}
