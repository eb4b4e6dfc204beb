// Package catalog is what a collection consists of: its schema, partitions,
// indexes, channels with their checkpoints, and segments with their files.
//
// Every change is one transaction that compares all that it was decided on, so
// that each revision of the metadata store is a whole catalog: a compaction
// shows its inputs or its outputs, a checkpoint moves with the segments that it
// covers or later. A snapshot is a read at one revision; see [Catalog.At] and
// [Catalog.ScanSegments].
//
// # States
//
//	collection  RESTORING -> ACTIVE -> DROPPING; the name goes with the change
//	            of state to DROPPING, the record when the last of its files is
//	            gone; only an ACTIVE one is written
//	partition, index
//	            ACTIVE -> DROPPING, likewise; the drop also puts the collection's
//	            record, which every change compares, so that no segment or build
//	            joins what is being dropped
//	segment     GROWING -> SEALED -> FLUSHED, IMPORTING -> FLUSHED; a dropped
//	            segment leaves as a unit
//	unit        a dropped segment, a dropped index build or replaced files: a
//	            record of its own. What it says never changes; while a snapshot
//	            holds the unit, it may lie in the object store, and a stub here
//	id          free -> claimed by one collection of the cluster, for a segment or
//	            for a part of one -> gone, when its last record goes, for good; see
//	            gone.go
//
// # Ownership
//
// Collections share roots: each restore makes one more under the roots of its
// source. Only what a segment has to itself is ever deleted with it:
//
//	place       what the layouts say of a path: the ids that stand where a layout
//	            has ids, see [layout.PlaceOf]. Each place is that of one segment. An
//	            equal number elsewhere, such as a log id, makes no place
//	claim       /catalog/owner/segment/<id> or /catalog/owner/build/<id>, which says
//	            which collection has the id. So a segment's id is that of one
//	            segment in the cluster
//	own file    one that lies at the place of the segment that has it, in the
//	            collection that has that one; see [Owns], the one decision
//	foreign     every other file. It is captured, checked and copied like any other,
//	            and never deleted
//	disputed    an id from before ids were claimed that two collections have, or at
//	            whose place something else has a file. The record says so, and the
//	            segment owns no file
//
// A file at the place of another segment is refused where it is registered, with
// the name of the owner. So whatever has a file at a place is the segment that has
// the id, and what is deleted with that segment is held by nothing else: not by
// another collection, and not by a snapshot of one, which captured what was
// registered.
//
// # Transactions
//
//	register  AddSegments, a swap that adds segments or index builds, an update that
//	          takes files out, which gives them an id of their own
//	          compares: no claim to any of the ids, for a segment or for a part; the
//	          blocks of gone ids as read, none of which has one of them; no restore that claims ids has come since it was looked; what else the
//	          change was decided on
//	          puts: a claim for each id, the records
//	admit     a restore claims the ids of its segments and builds as one range,
//	          /catalog/owner/range/<last>
//	          compares: no claim to any id of the range
//	copy      compares: the job. Puts: claims and records of its segments. Nothing
//	          else claims ids of the range, so there is no claim to compare
//	roll back deletes: claims and records. The claim to the range goes with the job's
//	          record, after the last look for copies that came late
//	confirm   compares: tombstone; the blocks of its ids as read. Deletes: tombstone,
//	          and the claims to its ids, of which it is the last record. Puts: the
//	          blocks with these ids. See package gc
//	upgrade   see [Catalog.ClaimAll]: once, before anything is registered or granted,
//	          for the records of releases that claimed no ids
//
// # Failures
//
//	a compare fails      read the premises again and decide anew, a few times;
//	                     then ErrConflict: nothing was written
//	no answer            the error wraps meta.ErrUnavailable: it may have been
//	                     written. With a request token a repeat tells; segments
//	                     are idempotent by id, checkpoints by value, drops by id
//	store is full        meta.ErrNoSpace: nothing was written. Drops are refused
//	                     as well, for they put the record of what they drop
//	id is claimed        ErrIDOwned names the collection that has it; by the same
//	                     collection it is a repeat, or ErrSegmentExists
//	id is gone           ErrIDUsed; a drop of it is success
//	path at the place    ErrPlaceOwned names the owner: nothing was written
//	of another
//	upgrade dies         it begins again at the next start; what is claimed is found
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
	maxChannelBytes  = 4096      // of all channels' names: a snapshot's record holds them
	MaxSegmentBytes  = 1_200_000 // of a segment's record, with the room that a restore of it needs
	MaxShownBytes    = 4_128_768 // of an answer that shows a segment, beneath the 4 MiB of a gRPC client
	MaxRecordBytes   = 768 << 10 // of a collection's record
	maxPartBytes     = 512 << 10 // of a partition's or index's, which share a transaction with it
	maxPartsBytes    = 16 << 20  // of all partitions and indexes of a collection that are not small
	smallPartBytes   = 4 << 10   // of a partition's or index's record that is
	maxRemembered    = 64 << 10  // of what a request token keeps
	MaxSwap          = 60        // inputs, outputs and updates of one compaction
	maxAttempts      = 16        // of a change whose premises keep changing
	maxReservedIDs   = 64        // ranges
	maxSegmentFiles  = 4096
	maxRemoved       = 4096 // paths of files taken from a segment that are known
	maxEngineData    = 16 << 10
	defaultPartition = 0 // belongs to all
)

// Errors that callers tell apart; each is wrapped with what it is about.
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
	ErrIDOwned              = errors.New("id belongs to something else")
	ErrPlaceOwned           = errors.New("path lies at the place of something else")
	ErrRootNested           = errors.New("root lies inside another, or has another inside")
	ErrIDRangeTaken         = errors.New("id range taken")
	ErrReserveNotAllowed    = errors.New("this server neither reserves nor releases ids: set allow_reserve_ids, or take ids by count")
	ErrLimitExceeded        = errors.New("limit exceeded")
	ErrTooLarge             = errors.New("change too large for one transaction")
	ErrRevisionChanged      = errors.New("revision changed")
	ErrConflict             = errors.New("too many concurrent changes")
)

// InvalidError is an ErrInvalid that knows the field.
type InvalidError struct {
	Field   string // path of the field in the request
	Problem string // what is wrong, and what would be right
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

// CheckName says whether name may be used. The error is an *InvalidError.
func CheckName(field, name string) error {
	if nameRule.MatchString(name) {
		return nil
	}
	return invalid(field, "%q is not a name: 1 to 255 of A-Z a-z 0-9 _ . - are, and the first is not . or -", name)
}

// Options are what a Catalog needs.
type Options struct {
	KV  meta.KV
	Now func() time.Time
	// Stamp returns the time at which a thing is dropped, which the collector judges
	// later, perhaps in another replica. Nil: Now.
	Stamp func(ctx context.Context) (time.Time, error)
	Rand  io.Reader
	// HasStore says whether an object store of that alias is configured.
	HasStore func(alias string) bool
	Requests *request.Leases
	// Held reads the object at key of the store of that alias, which holds the
	// record of a parked unit; see [ReadHeld]. Nil: parked units are an error.
	Held func(ctx context.Context, store, key string) ([]byte, error)
	// Hold writes such an object, and returns the alias of its store; see
	// [WriteHeld]. Nil: a swap whose inputs do not fit in one transaction is
	// meta.ErrTooLarge.
	Hold func(ctx context.Context, key string, data []byte) (store string, err error)
	// RaiseIDs raises the ceiling of the ids that are handed out to at least to,
	// once that is noted outside of the metadata store. Nil: no ceiling is kept.
	RaiseIDs func(ctx context.Context, to int64) error
	// AllowReserve allows ReserveIDs and ReleaseIDs to change anything.
	AllowReserve bool
	// MaxGoneRanges is how many ranges the ids that are gone may make of each 4096
	// ids before the gaps between them are closed. Default DefaultMaxGoneRanges.
	MaxGoneRanges int
	// GoneGapAge is how long ago the last of these ids must have gone for that.
	// Default DefaultGoneGapAge.
	GoneGapAge time.Duration
	// Jitter spreads attempts: numbers in [0, 1). Default [rand.Float64].
	Jitter func() float64
}

// Catalog reads and changes the catalog. It is safe for concurrent use and
// holds no state but a stock of ids.
type Catalog struct {
	kv       meta.KV
	now      func() time.Time
	stamp    func(ctx context.Context) (time.Time, error)
	rand     io.Reader
	hasStore func(string) bool
	requests *request.Leases
	held     func(ctx context.Context, store, key string) ([]byte, error)
	hold     func(ctx context.Context, key string, data []byte) (store string, err error)
	jitter   func() float64
	ids      *allocator

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
		kv: o.KV, now: o.Now, stamp: o.Stamp, rand: o.Rand, hasStore: o.HasStore, requests: o.Requests, held: o.Held, hold: o.Hold,
		jitter: o.Jitter, allowReserve: o.AllowReserve, maxGoneRanges: o.MaxGoneRanges, goneGapAge: o.GoneGapAge,
	}
	c.ids = newAllocator(o.KV, o.RaiseIDs, c.pause)
	return c
}

// plan is one attempt at a change.
type plan struct {
	txn    meta.Txn
	id     int64  // of what is changed
	result []byte // its record; a request token remembers it unless it is large
	// revision is at which there was nothing to change, when txn is empty.
	revision int64
}

// outcome is how a change ended.
type outcome struct {
	id       int64
	result   []byte // nil in a repeat when the record is large
	revision int64
}

// change makes a plan and carries it out, and does so again while others change
// the plan's premises. A repeat under a request token gets the first outcome.
func (c *Catalog) change(ctx context.Context, tok request.Token, decide func(ctx context.Context) (plan, error)) (outcome, error) {
	for attempt := range maxAttempts {
		if attempt > 0 {
			if err := c.pause(ctx, attempt); err != nil {
				return outcome{}, err
			}
		}
		known, err := request.Find(ctx, c.kv, tok)
		if err != nil {
			return outcome{}, err
		}
		var p plan
		if known == nil {
			if p, err = decide(ctx); err != nil {
				// The same request may have succeeded since, and be why this one cannot.
				var findErr error
				if known, findErr = request.Find(ctx, c.kv, tok); known == nil || findErr != nil {
					return outcome{}, err
				}
			}
		}
		if known != nil {
			return outcome{id: known.ID, result: known.Result, revision: known.Revision}, nil
		}
		var lease request.Lease
		if tok.Given() {
			if lease, err = c.requests.Get(ctx); err != nil {
				return outcome{}, err
			}
		}
		p.txn.If = append(p.txn.If, tok.Absent()...)
		remember := p.result
		if len(remember) > maxRemembered { // a repeat reads what has become of it
			remember = nil
		}
		p.txn.Then = append(p.txn.Then, tok.End(lease, p.id, remember)...)
		if len(p.txn.Then) == 0 { // nothing to change, nothing to remember
			return outcome{id: p.id, result: p.result, revision: p.revision}, nil
		}
		p.txn.Name = cmp.Or(p.txn.Name, "catalog.change")
		res, err := c.kv.Txn(ctx, p.txn)
		switch {
		case errors.Is(err, meta.ErrLeaseNotFound):
			c.requests.Forget(ctx, lease)
		case errors.Is(err, meta.ErrTooLarge):
			return outcome{}, fmt.Errorf("%w: %w; make it in smaller steps", ErrTooLarge, err)
		case err != nil:
			return outcome{}, err
		case res.Succeeded:
			return outcome{id: p.id, result: p.result, revision: res.Revision}, nil
		}
	}
	return outcome{}, fmt.Errorf("%w: gave up after %d attempts; nothing was written", ErrConflict, maxAttempts)
}

// pause waits a little before another attempt, longer each time.
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
