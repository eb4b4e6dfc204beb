// Package meta is the contract for the small, strongly consistent store that
// holds lifecycle, catalog and jobs, and nothing of what they mean.
//
// [KV] is what etcd offers, cut down to what snapshotd uses: reads at one
// revision, transactions of compares and writes, watches that resume from a
// revision, and leases. There are two implementations, etcd and memory; both
// pass the suite in metatest, limits and error classes included, so that a
// test on the memory twin can be trusted. [Faulty] wraps either.
//
// An error from a write is never proof that the write did not happen; see
// [KV.Txn].
package meta

import (
	"context"
	"errors"
	"slices"
	"time"
)

// Limits that both implementations enforce. They are etcd's defaults, with
// room left for the envelope that the client adds.
const (
	// MaxTxnOps bounds each of the three lists of a [Txn]: compares, then, else.
	MaxTxnOps = 128
	// MaxTxnBytes bounds the keys and values of one [Txn], those of its three
	// lists together, in bytes.
	MaxTxnBytes = 1_500_000
	// MaxKeyBytes bounds one key. etcd itself has no bound.
	MaxKeyBytes = 1024
)

// Errors that callers tell apart. Every other error from a [KV] means that the
// store could not be asked or did not answer: it wraps ErrUnavailable, or the
// error of the caller's own context when that has ended, and the outcome of a
// write that met it is unknown. No error carries a gRPC status.
var (
	// ErrUnavailable means that no answer came, or none that can be used. A
	// write may have happened.
	ErrUnavailable = errors.New("metadata store unavailable")
	// ErrCompacted means that the revision asked for is no longer kept.
	ErrCompacted = errors.New("revision compacted")
	// ErrWatchBroken means that a watch was shown a change at or before a revision up
	// to which it was said to have seen everything. What it has delivered may lack
	// others as well: who keeps a copy of the range reads it again.
	ErrWatchBroken = errors.New("watch out of order")
	// ErrTooOld means that the store's servers are of a release that is not used.
	// The request was not sent.
	ErrTooOld = errors.New("metadata store too old")
	// ErrDenied means that the store knows who asks and refuses, or refuses to know.
	// A transaction that meets it changed nothing. It does not pass by itself.
	ErrDenied = errors.New("metadata store denies access")
	// ErrCorrupt means that the store has found its own data damaged, and serves nothing
	// until an operator has mended it. It comes with ErrUnavailable.
	ErrCorrupt = errors.New("metadata store found its data damaged")
	// ErrLeaseNotFound means that the lease expired, was revoked, or never was.
	// A transaction that meets it changed nothing.
	ErrLeaseNotFound = errors.New("lease not found")
	// ErrNoSpace means that the store is full: puts and lease grants are refused
	// while deletes pass. A transaction that meets it changed nothing.
	ErrNoSpace = errors.New("metadata store is full")
	// ErrTooLarge means that a transaction or a key breaks a limit of this
	// package. It was not sent, or was refused whole.
	ErrTooLarge = errors.New("transaction too large")
	// ErrInvalid means that the caller asked for what cannot be: a key that does
	// not begin with a slash, a range that ends before it begins, a key put twice
	// in one transaction. It was not sent.
	ErrInvalid = errors.New("invalid request")
)

// Refused says whether a transaction that ended with err changed nothing, and
// will not.
func Refused(err error) bool {
	return isOneOf(err, ErrLeaseNotFound, ErrNoSpace, ErrTooLarge, ErrTooOld, ErrDenied, ErrInvalid)
}

// Unusable says whether err is for the store itself, whatever was asked: it did not
// answer, is full, too old, or denies access. The same request goes well once the
// store is well.
func Unusable(err error) bool {
	return isOneOf(err, ErrUnavailable, ErrNoSpace, ErrTooOld, ErrDenied)
}

func isOneOf(err error, list ...error) bool {
	return slices.ContainsFunc(list, func(e error) bool { return errors.Is(err, e) })
}

// KeyValue is one key at one revision.
type KeyValue struct {
	Key            string
	Value          []byte // nil when empty; not to be changed by the reader
	CreateRevision int64  // when the key last came into being
	ModRevision    int64  // when this value was written
	Lease          LeaseID
}

// LeaseID names a lease. Zero is no lease.
type LeaseID int64

// KV is a strongly consistent key-value store with revisions. Every write
// raises the revision of the whole store by one; a transaction is one write, and
// one that puts nothing and deletes nothing is none. A store that was never
// written is at revision 1. All methods are safe for concurrent use.
//
// Every key begins with a slash; the range of all of them is from "/" to "0".
// Values are kept as they were handed over; the caller may use its slices again.
type KV interface {
	// Get returns the value of key at the newest revision, read linearizably,
	// and the store's revision at that moment. A key that does not exist is not
	// an error: found is false, and the revision still stands.
	Get(ctx context.Context, key string) (kv KeyValue, found bool, revision int64, err error)

	// Range returns the keys of r in key order, all at one revision: r.Revision
	// if it is positive, else the newest, read linearizably. A revision that is
	// compacted is ErrCompacted, one that is yet to come ErrUnavailable. The
	// answer is one message: what may be long goes through Scan.
	Range(ctx context.Context, r Range) (RangeResult, error)

	// Scan calls fn with the keys of [from, to) in key order, in batches of
	// bounded size, all at one revision: revision if it is positive, else the
	// newest. It returns the revision that it read at. It stops at fn's first
	// error and returns it as it is. A revision that is compacted, before or in
	// mid-scan, is ErrCompacted; fn may by then have seen a part, as it may with
	// every other error. fn is called by the calling goroutine, never with an
	// empty batch, and may keep the batch; a slow one holds the scan up but does
	// not make it fail, unless the revision is compacted meanwhile.
	Scan(ctx context.Context, from, to string, revision int64, fn func([]KeyValue) error) (int64, error)

	// Txn applies t.Then if every compare of t.If holds, else t.Else, in one
	// atomic step. The operations run in order, and a get sees what came before
	// it. When it returns an error that is not ErrLeaseNotFound, ErrNoSpace,
	// ErrTooLarge, ErrTooOld, ErrDenied or ErrInvalid, the transaction may have been applied, or may
	// still be: read back before deciding anything, and take "not there" for an
	// answer only after a transaction that makes the write impossible. It is
	// never sent twice.
	//
	// A key may be put at most once in a transaction, and not be deleted in the
	// same; deletes may overlap. Leases count in the branch that runs; a full
	// store refuses a transaction with a put in either.
	Txn(ctx context.Context, t Txn) (TxnResult, error)

	// Watch reports every change of the keys in [from, to) after revision after,
	// in order, without gaps and without repeats; after may be a revision that
	// is yet to come. It does not block, and ends with ctx, which must end for
	// its resources to be freed. Errors show in Next.
	Watch(ctx context.Context, from, to string, after int64) Watcher

	// Grant makes a lease that ends ttl from now unless it is kept alive. A ttl
	// is rounded up to whole seconds; the least is one second, and with etcd one
	// and a half election timeouts. A lease never ends early, and may end some
	// time late.
	Grant(ctx context.Context, ttl time.Duration) (LeaseID, error)
	// KeepAlive renews a lease once, for its full ttl from now. ErrLeaseNotFound
	// is final: the lease never comes back.
	KeepAlive(ctx context.Context, id LeaseID) error
	// Revoke ends a lease at once; the keys under it are gone in one revision,
	// as they are when it expires.
	// Once it has returned nil, no transaction that puts under the lease can
	// take effect any more. A lease that is not there is not an error.
	Revoke(ctx context.Context, id LeaseID) error
}

// Range asks for the keys of [From, To), or for the key From alone when To is
// empty. See [Prefix].
type Range struct {
	From, To string
	Revision int64 // 0 is the newest
	Limit    int   // 0 is all
	KeysOnly bool
}

// RangeResult is the answer to a [Range].
type RangeResult struct {
	KVs      []KeyValue
	More     bool  // the limit cut the answer
	Count    int64 // keys in the range, those cut off by the limit included
	Revision int64 // the store's revision when it answered
}

// Watcher is a running watch. Next and Progress must not be called at the
// same time as themselves.
type Watcher interface {
	// Next waits for the next batch: all changes of one or more whole revisions,
	// or no change and a raised Revision when the store said how far it has
	// come. It returns ErrCompacted when the watch cannot go on without a gap,
	// ErrWatchBroken when the store contradicts what it said, ErrDenied when it
	// refuses the range, ErrInvalid for a range that is none, and the context's
	// error when the watch's context ended. A store that is lost and found again is no error;
	// ErrUnavailable means that this watch is over, and that another may be
	// opened after the last revision. After an error Next only returns errors.
	Next() (WatchBatch, error)
	// Progress asks the store to report soon, through Next, the revision up to
	// which this watch has seen everything. The store may drop the request, as
	// etcd does while the watch catches up: ask again.
	Progress(ctx context.Context) error
}

// WatchBatch is a step of a watch.
type WatchBatch struct {
	Events []Event // in the order of their revisions; within one, in no order
	// Revision is greater than that of the batch before: everything at or
	// before it has been delivered.
	Revision int64
}

// Event is one change of one key. For a delete, by whatever way the key went, KV
// holds the key and, as ModRevision, the revision of the delete.
type Event struct {
	Deleted bool
	KV      KeyValue
}

// Txn is a transaction: compares, and what to do.
type Txn struct {
	// Name is the step of a protocol that the transaction makes, as an operation, a
	// dot and the step: "create.commit". Decorators of a [KV] match it: faults,
	// metrics, crash points. It is never stored and may be empty.
	Name string

	If   []Cond
	Then []Op
	Else []Op
}

// TxnResult is the outcome of a [Txn] that was decided.
type TxnResult struct {
	Succeeded bool  // whether the compares held
	Revision  int64 // of the transaction if it wrote, else the newest
	// Ranges holds, in order, what the gets of the branch that ran found.
	Ranges [][]KeyValue
}

// Cond is a compare on a key, or on each key of a range. A key that does not
// exist, and a range without keys, compare as one key with revisions 0, so that
// [RangeAbsent] holds for it. The zero Cond is invalid; use the constructors.
type Cond struct {
	From, To string
	Target   Target
	Op       Compare
	Revision int64
}

// Target is what a [Cond] looks at.
type Target int

// The targets.
const (
	CreateRevision Target = iota + 1
	ModRevision
)

// Compare is how a [Cond] compares.
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

// RangeAbsent holds while no key of [from, to) exists, which also guards
// against those that are yet to come.
func RangeAbsent(from, to string) Cond {
	return Cond{From: from, To: to, Target: CreateRevision, Op: Equal}
}

// Unchanged holds while key is as it was read: present, and last written at
// revision mod.
func Unchanged(key string, mod int64) Cond {
	return Cond{From: key, Target: ModRevision, Op: Equal, Revision: mod}
}

// SameKey holds while key is the very one that came into being at revision
// create, however often it was put since: a key that was lost and put again is
// another.
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

// OpKind says what an [Op] does.
type OpKind int

// The kinds of operation.
const (
	OpPut OpKind = iota + 1
	OpDelete
	OpGet
)

// Put writes key. The key is under no lease afterwards.
func Put(key string, value []byte) Op { return Op{Kind: OpPut, From: key, Value: value} }

// PutLeased writes key, which goes when the lease does.
func PutLeased(key string, value []byte, lease LeaseID) Op {
	return Op{Kind: OpPut, From: key, Value: value, Lease: lease}
}

// Delete removes key; one that is not there is not an error.
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
