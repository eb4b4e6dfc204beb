// Package epoch notices that the metadata store has gone back in time, as etcd
// has that was restored from a backup. Such a store hands out ids anew that are
// in use, and knows nothing of the snapshots that were taken since: it must
// neither allocate nor delete. So it notes in the object store, which outlives
// it, how far it has come.
//
// # Words
//
//	beat     a note, and its number: the object gc/epoch/<beat>.json. The one with
//	         the greatest number is the newest
//	intent   the object of the next beat, byte for byte, in /epoch: who finds it can
//	         finish the beat
//	ceiling  no id from it on is handed out before a beat has noted a higher one
//	behind   the metadata store is older than the newest beat; the key /behind
//	floor    ids below it that have no record may have been lost with a store that
//	         was behind: their objects are left alone for ever
//	history  the number of recoveries, plus one. It marks the records of which the
//	         create revision may be compared with those of others: in a store to
//	         which records were copied, a recovery excludes the copies
//
// # States
//
//	         intend                create, look, done
//	beat n ----------> beat n, n+1 intended ----------> beat n+1
//
//	         check                  recover
//	(fine) ---------> /behind ------------------> (fine)
//
// # A beat
//
//	read    at one revision: /epoch, /ids, /behind
//	intend  compares: /epoch as read, no /behind
//	        puts: /epoch with the intent: number, nonce, the revision of the read, a
//	        ceiling not below the one before, the time
//	create  (object store) the object, if there is none. One of equal bytes is
//	        success
//	look    check, as below: a greater beat may be there
//	done    compares: /epoch as intended, no /behind; when the ceiling grew, /ids as
//	        read
//	        puts: /epoch with the beat, without the intent; when the ceiling grew,
//	        /ids with it
//	        after that all objects but the newest two are deleted
//
// Anybody may beat: the leader each minute, and each replica that needs a higher
// ceiling. Who finds an intent finishes that beat first. Whoever finishes it writes the
// same bytes under the same key, so nobody minds how often that is done, or how late.
// An object that a frozen process makes again after it was deleted is not the
// newest, and goes with the next beat.
//
// # Check
//
// The objects are listed, the newest is read, and then /epoch, which so is at least
// as new as the list. The store is behind when the newest object is
//
//	beyond the beat that is done, and not the one that is intended
//	of a greater revision than the store has
//	of another cluster
//
// where the last two say nothing of beats up to the last recovery. For a store that
// never went back none of it can be: an object is made after its intent is written.
//
//	behind   compares: /epoch as read, no /behind
//	         puts: /behind
//	recover  compares: /epoch, /ids, /behind as read
//	         puts: /ids, whose next id is not below the greatest ceiling; /epoch with
//	         the greatest beat, or beyond the intended one, without the intent, with
//	         that next id as the floor, and with the number of the next history;
//	         deletes: /behind. Where the store is not behind nothing is put, unless
//	         it is forced
//	         then a beat follows
//
// While /behind is there, the transactions that allocate ids, and those that grant
// deletions, fail on a compare of it, and the leader does nothing.
//
// # Failures
//
//	intend, done: no answer  the beat failed; the next one reads what has become of
//	                         it and goes on from there
//	create: no answer        likewise; the object is there or not, and is made of
//	                         the intent
//	process dies, freezes    the next who beats finishes the beat
//	create: other bytes are  check decides; it says behind, unless the beat was
//	there                    finished by another meanwhile and the object is gone
//	object store is silent   the check or beat fails and is tried again: that is not
//	                         behind. A leader that has begun goes on; one that has not
//	                         waits. Ids are allocated up to the ceiling
//	objects are lost         a warning; the next beat makes one
//	objects are not listed   the known beat and those after it are read by name
//	an id comes back         a create whose new id has an object that snapshotd wrote
//	                         earlier, with other content, puts /behind (alarm). Any
//	                         other object, and a read that was altered, fails the
//	                         create alone
//	object is damaged        check fails, naming it, until somebody looks into it
//	recover: no answer       a repeat finds it done, or does it
//	recover: the beat fails  the error says so. The recovery holds; the next beat
//	                         makes good for it
//
// # What is not noticed
//
// A beat is a sample. Ids that were handed out, and deletions that were granted,
// between the last beat before a backup and the next one, are not seen to be missing
// when the store ends before that next one. A forced Recover after every restore
// passes over such ids in any case. Replicas that run while their store is replaced
// notice with the leader's next check; they are to be stopped first.
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

// Headroom is how many ids a raised ceiling leaves at least above what was asked
// for.
const Headroom = 1_000_000

// maxAttempts bounds how often a step is decided anew when its premises changed.
const maxAttempts = 16

// Errors that callers tell apart.
var (
	// ErrBehind means that the metadata store has gone back in time.
	ErrBehind = errors.New("the metadata store is older than what it wrote into the object store")
	// ErrConflict means that others changed the premises again and again. To try
	// again helps.
	ErrConflict = errors.New("too many concurrent beats")
	// ErrDamaged means that the newest note in the object store cannot be read, or
	// is of a release that this one does not know. To try again does not help.
	ErrDamaged = errors.New("unreadable epoch object")
)

// wayOut is what to do about ErrBehind.
const wayOut = "nothing is allocated or deleted until `snapshotctl recover`"

// Options are what an Epoch needs.
type Options struct {
	KV      meta.KV
	Store   object.Store // the one for snapshots
	Cluster string       // the cluster's id
	Now     func() time.Time
	Rand    io.Reader
	Log     *zap.Logger // default: none
	// Problems gets what fails at each try. Default: its own.
	Problems *lasting.Problems
	// Interval is between the leader's checks. Default 1 min.
	Interval time.Duration
	// Jitter spreads attempts: numbers in [0, 1). Default that of [meta.Backoff].
	Jitter func() float64
}

// Epoch keeps the note of a metadata store in an object store, and compares the
// two. It is safe for concurrent use, and holds no state.
type Epoch struct {
	o    Options
	turn chan struct{} // holds one token; who has it may beat

	unknown, stops, leads, beats, forgets, lists *lasting.Problem
}

// New returns an Epoch. It does nothing by itself.
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
	e.unknown = add("epoch check", "the leader does nothing before it knows that the metadata store has not gone back in time, and tries again",
		"expiry, removal and collection")
	e.stops = add("epoch behind", "the leader does nothing, since the metadata store has gone back in time", "")
	e.leads = add("epoch watch",
		"this replica goes on leading without knowing whether the metadata store has gone back in time, and looks again later", "")
	e.beats = add("epoch beat", "how far the metadata store has come could not be noted in the object store; it is tried again", "")
	e.forgets = add("epoch forget", "old epoch objects stay until the next beat", "")
	e.lists = add("epoch list", "the object store lists none of its epoch objects although it has them; they are read by name", "")
	e.turn <- struct{}{}
	return e
}

// state is what the metadata store says, all at one revision.
type state struct {
	revision int64
	epoch    *storagev1.Epoch // an empty one when there is none
	intent   *note            // nil: no beat is under way
	ids      *storagev1.Allocator
	behind   error // an ErrBehind while /behind is there

	epochIs, idsAre, behindIs meta.Cond // that the keys are as read
}

func (e *Epoch) read(ctx context.Context) (*state, error) {
	res, err := e.o.KV.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Get(keys.Epoch), meta.Get(keys.IDs), meta.Get(keys.Behind)}})
	if err != nil {
		return nil, fmt.Errorf("read the epoch: %w", err)
	}
	s := &state{
		revision: res.Revision,
		epoch:    &storagev1.Epoch{Format: record.Format},
		ids:      &storagev1.Allocator{Format: record.Format, Next: 1},
		epochIs:  meta.Absent(keys.Epoch), idsAre: meta.Absent(keys.IDs), behindIs: meta.Absent(keys.Behind),
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
	s.behind = Blocked(res.Ranges[2])
	return s, nil
}

// Blocked returns nil, or an [ErrBehind] that says what was seen, of what a get of
// [keys.Behind] found. A transaction that allocates or grants compares besides that
// this key is absent.
func Blocked(found []meta.KeyValue) error {
	if len(found) == 0 {
		return nil
	}
	rec := &storagev1.Behind{}
	if err := record.Decode(found[0], rec); err != nil {
		return fmt.Errorf("%w; %s: %w", ErrBehind, wayOut, err)
	}
	return behindError(rec)
}

func behindError(rec *storagev1.Behind) error {
	if object := rec.GetObject(); object != "" {
		return fmt.Errorf("%w, or ids come back: object %s exists with other content under an id that was just handed out; %s",
			ErrBehind, object, wayOut)
	}
	return fmt.Errorf("%w: beat %d at revision %d there, beat %d at revision %d here; %s", ErrBehind,
		rec.GetBeat(), rec.GetRevision(), rec.GetOwnBeat(), rec.GetOwnRevision(), wayOut)
}

// History returns the number of the history of the metadata store, of what a get
// of [keys.Epoch] found. It is positive, and each recovery raises it. It is 0 when
// the record is unreadable: then it equals the history of no record.
func History(found []meta.KeyValue) int64 {
	rec := &storagev1.Epoch{}
	if len(found) > 0 && record.Decode(found[0], rec) != nil {
		return 0
	}
	return rec.GetHistory() + 1
}

// Behind says why nothing is allocated and deleted: nil while it is, else an
// ErrBehind. It does not look into the object store. The second error is that of
// the read.
func (e *Epoch) Behind(ctx context.Context) (behind, err error) {
	kv, found, _, err := e.o.KV.Get(ctx, keys.Behind)
	if err != nil {
		return nil, fmt.Errorf("read whether the metadata store is behind: %w", err)
	}
	if !found {
		return nil, nil
	}
	return Blocked([]meta.KeyValue{kv}), nil
}

// Floor returns the id below which nothing is deleted for the reason that it has
// no record; 0 and 1: there is none such. It only grows.
func (e *Epoch) Floor(ctx context.Context) (int64, error) {
	s, err := e.read(ctx)
	if err != nil {
		return 0, err
	}
	return s.epoch.GetFloor(), nil
}
