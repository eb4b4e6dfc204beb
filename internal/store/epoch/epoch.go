package epoch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Headroom is the minimum number of ids between a requested and the raised id limit.
const Headroom = 1_000_000

// maxAttempts bounds how often a step is retried after its preconditions failed.
const maxAttempts = 16

// Errors for callers to distinguish.
var (
	// ErrRolledBack means that the metadata store went back in time.
	ErrRolledBack = errors.New("the metadata store is older than its epoch objects in the object store")
	// ErrDamaged means that the newest mark in the object store is unreadable or
	// written by an unknown release. A retry fails as well.
	ErrDamaged = errors.New("unreadable epoch object")
)

// remedy is the operator's action after ErrRolledBack.
const remedy = "nothing is allocated or deleted until `snapshotctl recover`"

// Options are the dependencies and settings of an Epoch.
type Options struct {
	KV      meta.KV
	Store   object.Store // the snapshot store
	Cluster string       // the cluster's id
	Now     func() time.Time
	Rand    io.Reader
	Log     *zap.Logger // default: none
	// Problems receives repeated failures. Default: a new one.
	Problems *lasting.Problems
	// Interval is the time between two checks of the leader. Default 1 min.
	Interval time.Duration
	// Jitter returns numbers in [0, 1) that spread attempts. Default that of [meta.Backoff].
	Jitter func() float64
}

// Epoch writes the high-water marks of a metadata store to an object store, and compares
// the two. It is safe for concurrent use, and holds no state.
type Epoch struct {
	o    Options
	turn chan struct{} // one token; its holder may send a heartbeat

	unknown, stops, leads, heartbeats, deletes, lists *lasting.Problem
}

// New returns an Epoch. It starts no goroutine.
func New(o Options) *Epoch {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	if o.Problems == nil {
		o.Problems = lasting.New(o.Now)
	}
	e := &Epoch{o: o, turn: make(chan struct{}, 1)}
	add := func(name, text, stops string) *lasting.Problem { return o.Problems.Add(o.Log, name, text, stops) }
	e.unknown = add("epoch check", "metadata rollback check failed, retrying; the leader does no work until it passes",
		"expiry, removal and collection")
	e.stops = add("epoch behind", "metadata rollback: the leader does no work", "")
	e.leads = add("epoch watch", "metadata rollback check failed, retrying; this replica continues to lead", "")
	e.heartbeats = add("epoch beat", "epoch heartbeat failed, retrying", "")
	e.deletes = add("epoch forget", "old epoch objects not deleted, retrying at the next heartbeat", "")
	e.lists = add("epoch list", "the object store omits existing epoch objects from lists; they are read by name", "")
	e.turn <- struct{}{}
	return e
}

// state is the content of the metadata store at one revision.
type state struct {
	revision   int64
	epoch      *storagev1.Epoch // empty if the record does not exist
	intent     *mark            // nil: no heartbeat is under way
	ids        *storagev1.Allocator
	rolledBack error // an ErrRolledBack while /behind exists

	epochIs, idsAre, behindIs meta.Cond // the keys are unchanged since the read
}

func (e *Epoch) read(ctx context.Context) (*state, error) {
	res, err := e.o.KV.Txn(
		ctx,
		meta.Txn{Then: []meta.Op{meta.Get(keys.Epoch), meta.Get(keys.IDs), meta.Get(keys.RolledBack)}},
	)
	if err != nil {
		return nil, fmt.Errorf("read the epoch: %w", err)
	}
	s := &state{
		revision: res.Revision,
		epoch:    &storagev1.Epoch{Format: record.Format},
		ids:      &storagev1.Allocator{Format: record.Format, Next: 1},
		epochIs:  meta.Absent(keys.Epoch), idsAre: meta.Absent(keys.IDs), behindIs: meta.Absent(keys.RolledBack),
	}
	for _, kv := range res.Ranges[0] {
		s.epochIs = meta.Unchanged(kv.Key, kv.ModRevision)
		if err := record.Decode(kv, s.epoch); err != nil {
			return nil, err
		}
		if data := s.epoch.GetIntent(); len(data) > 0 {
			if s.intent, err = decode(s.epoch.GetBeat()+1, data); err != nil {
				return nil, fmt.Errorf("intent in %s: %w", kv.Key, err)
			}
		}
	}
	for _, kv := range res.Ranges[1] {
		s.idsAre = meta.Unchanged(kv.Key, kv.ModRevision)
		if err := record.Decode(kv, s.ids); err != nil {
			return nil, err
		}
	}
	for _, kv := range res.Ranges[2] {
		s.behindIs = meta.Unchanged(kv.Key, kv.ModRevision)
	}
	s.rolledBack = Blocked(res.Ranges[2])
	return s, nil
}

// Blocked returns nil, or an [ErrRolledBack] with its cause, from the result of a get of
// [keys.RolledBack]. Transactions that allocate or grant must also compare that this key is
// absent.
func Blocked(found []meta.KeyValue) error {
	if len(found) == 0 {
		return nil
	}
	rec := &storagev1.Behind{}
	if err := record.Decode(found[0], rec); err != nil {
		return fmt.Errorf("%w; %s: %w", ErrRolledBack, remedy, err)
	}
	return rollbackError(rec)
}

func rollbackError(rec *storagev1.Behind) error {
	if object := rec.GetObject(); object != "" {
		return fmt.Errorf("%w, or an id was allocated twice: object %s exists with other content under a new id; %s",
			ErrRolledBack, object, remedy)
	}
	return fmt.Errorf("%w: heartbeat %d at revision %d there, heartbeat %d at revision %d here; %s", ErrRolledBack,
		rec.GetBeat(), rec.GetRevision(), rec.GetOwnBeat(), rec.GetOwnRevision(), remedy)
}

// History returns the history number of the metadata store from the result of a get of
// [keys.Epoch]. It is positive and grows with each recovery. An unreadable record has
// history 0, which equals that of no other record.
func History(found []meta.KeyValue) int64 {
	rec := &storagev1.Epoch{}
	if len(found) > 0 && record.Decode(found[0], rec) != nil {
		return 0
	}
	return rec.GetHistory() + 1
}

// RolledBack returns an ErrRolledBack as its first result while /behind exists, else nil.
// It does not read the object store. The second result is the error of the read.
func RolledBack(ctx context.Context, kv meta.KV) (rolledBack, err error) {
	v, found, _, err := kv.Get(ctx, keys.RolledBack)
	if err != nil {
		return nil, fmt.Errorf("read the metadata rollback state: %w", err)
	}
	if !found {
		return nil, nil
	}
	return Blocked([]meta.KeyValue{v}), nil
}

// LostBelow returns the id below which the absence of a record is no reason to delete an
// object; 0 and 1 mean that there is none. It never decreases.
func (e *Epoch) LostBelow(ctx context.Context) (int64, error) {
	s, err := e.read(ctx)
	if err != nil {
		return 0, err
	}
	return s.epoch.GetFloor(), nil
}
