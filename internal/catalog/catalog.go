// Package catalog reads and changes the catalog of collections: their schemas,
// partitions, indexes, channels with checkpoints, and segments with files.
//
// Every change is one transaction that compares every record it was decided on.
// So each revision of the metadata store is a consistent catalog: a compaction
// shows its inputs or its outputs, and a checkpoint moves with the segments that
// it covers or later. A snapshot is a read at one revision; see [Catalog.At] and
// [Catalog.ScanSegments].
//
// # States
//
//	collection  RESTORING -> ACTIVE -> DROPPING. The change to DROPPING deletes
//	            the name; the record is deleted when the last file is gone. Only
//	            an ACTIVE collection accepts writes
//	partition, index
//	            ACTIVE -> DROPPING, likewise. The drop also puts the collection's
//	            record, which every change compares, so that no segment or build
//	            joins a dropped partition or index
//	segment     GROWING -> SEALED -> FLUSHED, IMPORTING -> FLUSHED; a dropped
//	            segment becomes a unit
//	unit        a dropped segment, a dropped index build or removed files, with a
//	            record. Its content never changes; while a snapshot holds the
//	            unit, the record may be spilled to the object store, which leaves
//	            a stub here
//	id          unused -> claimed by one collection of the cluster, for a segment or
//	            for a part of one -> gone for good, when its last record is deleted;
//	            see gone.go
//
// # Ownership
//
// Collections share roots: each restore adds a collection under the roots of its
// source. A segment's deletion removes only the files that the segment owns:
//
//	place       the ids that a path has where its layout has ids, see
//	            [layout.PlaceOf]. Each place belongs to one segment. An equal number
//	            elsewhere, such as a log id, makes no place
//	claim       /catalog/owner/segment/<id> or /catalog/owner/build/<id>, which names
//	            the collection that has the id. So an id stands for one segment in
//	            the cluster
//	own file    a file at the place of its segment, in the collection that has the
//	            segment; see [Owns], the only function that decides it
//	foreign     every other file. It is captured, checked and copied like any other,
//	            and never deleted
//	disputed    an id from before ids were claimed that two collections have, or at
//	            whose place another segment has a file. The record has a flag, and
//	            the segment owns no file
//
// The registration of a file at the place of another segment is refused with the
// name of the owner. So only the segment with the id has files at its place, and
// nothing else holds what is deleted with that segment: no other collection, and
// no snapshot of one, for it captured only registered files.
//
// # Transactions
//
//	register  AddSegments, a segment change that adds segments or index builds, an
//	          update that removes files, which become a unit with a new id
//	          compares: no claim to any of the ids, for a segment or for a part; the
//	          blocks of gone ids as read, none of which has one of them; no new
//	          restore has claimed ids since the read; the other preconditions of
//	          the change
//	          puts: a claim for each id, the records
//	admit     a restore claims the ids of its segments and builds as one range,
//	          /catalog/owner/range/<last>
//	          compares: no claim to any id of the range
//	copy      compares: the job. Puts: claims and records of its segments. Nothing
//	          else claims ids of the range, so there is no claim to compare
//	roll back deletes: claims and records. The claim to the range is deleted with the
//	          job's record, after the last search for straggling copies
//	confirm   compares: tombstone; the blocks of its ids as read. Deletes: tombstone,
//	          and the claims to its ids, of which it is the last record. Puts: the
//	          blocks with these ids. See package gc
//	upgrade   see [Catalog.ClaimAll]: once, before anything is registered or granted,
//	          for the records of releases that claimed no ids
//
// # Failures
//
//	a compare fails      the preconditions are read and the change is decided again,
//	                     up to 16 times; then meta.ErrConflict: nothing was
//	                     written
//	no answer            the error wraps meta.ErrUnavailable: it may have been
//	                     written. With a request token a repeat returns the result;
//	                     segments are idempotent by id, checkpoints by value, drops
//	                     by id
//	store is full        meta.ErrNoSpace: nothing was written. Drops are refused
//	                     as well, for they put the record of the dropped unit
//	id is claimed        ErrIDOwned names the collection that has it; by the same
//	                     collection it is a repeat, or ErrSegmentExists
//	id is gone           ErrIDUsed; a drop of it succeeds
//	path at the place    ErrPlaceOwned names the owner: nothing was written
//	of another segment
//	upgrade dies         it starts again at the next start and finds its claims
//	process dies         each change is one transaction: it happened or not.
//	                     AddSegments and DropSegments are one per batch, and are
//	                     repeated from the beginning
package catalog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"regexp"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// Limits of a collection.
const (
	MaxPartitions    = 1024
	MaxIndexes       = 1024
	MaxChannels      = 64
	maxChannelBytes  = 4096      // of all channels' names, which a snapshot's record holds
	MaxSegmentBytes  = 1_200_000 // of a segment's record, including the growth by a restore
	MaxShownBytes    = 4_128_768 // of an answer with one segment, below the 4 MiB of a gRPC client
	MaxRecordBytes   = 768 << 10 // of a collection's record
	maxChildBytes    = 512 << 10 // of a partition's or index's record, which shares a transaction with it
	maxChildrenBytes = 16 << 20  // of all records of partitions and indexes of a collection, small ones excepted
	smallChildBytes  = 4 << 10   // of a small record of a partition or index
	maxTokenResult   = 64 << 10  // of a result that a request token stores
	MaxSegmentChange = 60        // inputs, outputs and updates of one compaction
	maxAttempts      = 16        // of a change outside of request.Loop
	maxReservedIDs   = 64        // ranges
	maxSegmentFiles  = 4096
	maxRemoved       = 4096 // hashes of removed paths in a segment's record
	maxEngineData    = 16 << 10
	defaultPartition = 0 // belongs to all
)

// Errors that callers distinguish; each is wrapped with details.
var (
	ErrInvalid              = errors.New("invalid request")
	ErrCollectionNotFound   = errors.New("collection not found")
	ErrCollectionExists     = errors.New("collection exists")
	ErrCollectionNotActive  = errors.New("collection not active")
	ErrCollectionMismatch   = errors.New("another collection has this name")
	ErrPartitionNotFound    = errors.New("partition not found")
	ErrPartitionExists      = errors.New("partition exists")
	ErrIndexNotFound        = errors.New("index not found")
	ErrIndexExists          = errors.New("index exists")
	ErrIndexBuildExists     = errors.New("index build exists")
	ErrSegmentNotFound      = errors.New("segment not found")
	ErrSegmentExists        = errors.New("segment exists")
	ErrSegmentState         = errors.New("segment state cannot go back")
	ErrFileNotFound         = errors.New("file not found")
	ErrFileExists           = errors.New("file exists")
	ErrCheckpointRegression = errors.New("checkpoint cannot go back")
	ErrIDNotAllocated       = errors.New("id not allocated")
	ErrIDUsed               = errors.New("id was used before")
	ErrIDOwned              = errors.New("id belongs to another collection")
	ErrPlaceOwned           = errors.New("path belongs to another segment")
	ErrRootNested           = errors.New("root inside another root, or around one")
	ErrIDRangeTaken         = errors.New("id range taken")
	ErrReserveNotAllowed    = errors.New("id reservation is disabled: set allow_reserve_ids, or allocate by count")
	ErrLimitExceeded        = errors.New("limit exceeded")
	ErrTooLarge             = errors.New("change too large for one transaction")
	ErrRevisionChanged      = errors.New("revision changed")
)

// InvalidError is an ErrInvalid with the field.
type InvalidError struct {
	Field   string // path of the field in the request
	Problem string // with the valid values
}

func (e *InvalidError) Error() string { return e.Field + ": " + e.Problem }

// Is makes an InvalidError match ErrInvalid.
func (e *InvalidError) Is(target error) bool { return target == ErrInvalid }

func invalid(field, format string, args ...any) error {
	return &InvalidError{Field: field, Problem: fmt.Sprintf(format, args...)}
}

// NamePattern is the rule for the names of snapshots, databases, collections,
// partitions, indexes and stores.
const NamePattern = `^[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}$`

var nameRule = regexp.MustCompile(NamePattern)

// CheckName returns nil for a valid name, else an *InvalidError.
func CheckName(field, name string) error {
	if nameRule.MatchString(name) {
		return nil
	}
	return invalid(field, "%q is not a name: a name has 1 to 255 of A-Z a-z 0-9 _ . - and begins with none of . -", name)
}

// Options configures a Catalog.
type Options struct {
	KV  meta.KV
	Now func() time.Time
	// Stamp returns the time of a drop, which the collector evaluates later, perhaps
	// in another replica. Default Now.
	Stamp func(ctx context.Context) (time.Time, error)
	Rand  io.Reader
	// HasStore reports whether an object store of that alias is configured.
	HasStore func(alias string) bool
	Requests *request.Leases
	// ReadSpilled reads the records of spilled units; see [ReadSpilled]. Nil: spilled
	// units are an error.
	ReadSpilled SpilledReader
	// Spill writes such an object, and returns the alias of its store; see
	// [WriteSpilled]. Nil: a change whose inputs do not fit in one transaction is
	// meta.ErrTooLarge.
	Spill func(ctx context.Context, key string, data []byte) (store string, err error)
	// RaiseIDs raises the limit of allocated ids to at least to, after it has recorded
	// the new limit outside of the metadata store. Nil: there is no limit.
	RaiseIDs func(ctx context.Context, to int64) error
	// AllowReserve enables changes by ReserveIDs and ReleaseIDs.
	AllowReserve bool
	// MaxGoneRanges is the number of ranges of gone ids per 4096 ids above which the
	// gaps between them are closed. Default DefaultMaxGoneRanges.
	MaxGoneRanges int
	// GoneGapAge is the minimum age of the last change of such ranges before their gaps
	// are closed. Default DefaultGoneGapAge.
	GoneGapAge time.Duration
	// Jitter spreads attempts: numbers in [0, 1). Default [rand.Float64].
	Jitter func() float64
}

// Catalog reads and changes the catalog. It is safe for concurrent use; its only
// state is a stock of allocated ids.
type Catalog struct {
	kv        meta.KV
	now       func() time.Time
	stamp     func(ctx context.Context) (time.Time, error)
	rand      io.Reader
	hasStore  func(string) bool
	requests  *request.Leases
	readSpill SpilledReader
	spill     func(ctx context.Context, key string, data []byte) (store string, err error)
	jitter    func() float64
	ids       *allocator

	allowReserve  bool
	maxGoneRanges int
	goneGapAge    time.Duration
}

// New returns a Catalog.
func New(o Options) *Catalog {
	if o.Jitter == nil {
		o.Jitter = rand.Float64
	}
	if o.Stamp == nil {
		o.Stamp = func(context.Context) (time.Time, error) { return o.Now(), nil }
	}
	if o.MaxGoneRanges == 0 {
		o.MaxGoneRanges = DefaultMaxGoneRanges
	}
	if o.GoneGapAge == 0 {
		o.GoneGapAge = DefaultGoneGapAge
	}
	c := &Catalog{
		kv: o.KV, now: o.Now, stamp: o.Stamp, rand: o.Rand, hasStore: o.HasStore, requests: o.Requests,
		readSpill: o.ReadSpilled, spill: o.Spill, jitter: o.Jitter, allowReserve: o.AllowReserve,
		maxGoneRanges: o.MaxGoneRanges, goneGapAge: o.GoneGapAge,
	}
	c.ids = newAllocator(o.KV, o.RaiseIDs, c.pause)
	return c
}

// plan is one attempt at a change.
type plan struct {
	txn    meta.Txn
	id     int64  // of the changed thing
	result []byte // its record; a request token stores it unless it is large
	// revision is the revision without anything to change, when txn is empty.
	revision int64
}

// outcome is the result of a change.
type outcome struct {
	id       int64
	result   []byte // nil in a repeat when the record is large
	revision int64
}

// change decides a plan and executes it, again while concurrent changes break its
// preconditions. A repeat under a request token gets the first outcome.
func (c *Catalog) change(
	ctx context.Context, tok request.Token, decide func(ctx context.Context) (plan, error),
) (outcome, error) {
	var out outcome
	loop := request.Loop{KV: c.kv, Pause: c.pause}
	known, err := loop.Do(ctx, tok, func(ctx context.Context) (request.Commit, error) {
		p, err := decide(ctx)
		return func(ctx context.Context) (done bool, err error) {
			out, done, err = c.commit(ctx, tok, p)
			return done, err
		}, err
	})
	if err != nil {
		return outcome{}, err
	}
	if known != nil {
		return outcome{id: known.ID, result: known.Result, revision: known.Revision}, nil
	}
	return out, nil
}

// commit executes a plan. It is not done when a compare failed or the token's lease was
// lost.
func (c *Catalog) commit(ctx context.Context, tok request.Token, p plan) (out outcome, done bool, err error) {
	var lease request.Lease
	if tok.IsSet() {
		if lease, err = c.requests.Get(ctx); err != nil {
			return outcome{}, false, err
		}
	}
	p.txn.If = append(p.txn.If, tok.Unused()...)
	remember := p.result
	if len(remember) > maxTokenResult { // a repeat reads the current record
		remember = nil
	}
	p.txn.Then = append(p.txn.Then, tok.End(lease, p.id, remember)...)
	if len(p.txn.Then) == 0 { // nothing to change, no token to write
		return outcome{id: p.id, result: p.result, revision: p.revision}, true, nil
	}
	p.txn.Name = cmp.Or(p.txn.Name, "catalog.change")
	res, err := c.kv.Txn(ctx, p.txn)
	switch {
	case errors.Is(err, meta.ErrLeaseNotFound):
		c.requests.Forget(ctx, lease)
		return outcome{}, false, nil
	case errors.Is(err, meta.ErrTooLarge):
		return outcome{}, false, fmt.Errorf("%w: %w; split it", ErrTooLarge, err)
	case err != nil:
		return outcome{}, false, err
	}
	return outcome{id: p.id, result: p.result, revision: res.Revision}, res.Succeeded, nil
}

// pause waits before another attempt: a random time below a limit that doubles from 1 ms
// to 64 ms.
func (c *Catalog) pause(ctx context.Context, attempt int) error {
	limit := time.Millisecond << min(attempt, 6)
	timer := time.NewTimer(time.Duration(c.jitter() * float64(limit)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
