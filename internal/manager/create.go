package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// endTimeout bounds the cleanup of a create that failed, timed out or was stopped.
const endTimeout = 10 * time.Second

// creation is the state of one create, which Run executes.
type creation struct {
	spec CreateSpec
	tok  request.Token

	segments int64 // of the collection, before the create began
	memory   *reservation
	revision int64 // to capture at; 0: the newest revision after begin

	begun chan struct{} // closed when the snapshot is durable as PENDING, or err is set
	ended chan struct{} // closed when the create has ended

	// snap is the PENDING record, nil if begin failed; valid once begun is closed.
	// last is the COMMITTED record; valid once ended is closed. err is valid once
	// ended is closed, and once begun is closed if snap is nil.
	snap, last *snapshot.Record
	err        error
}

// Create captures a collection. The create continues when ctx ends; a call with the
// same token waits for it.
func (m *Manager) Create(ctx context.Context, tok request.Token, spec CreateSpec) (*snapshot.Record, error) {
	s, err := m.startCreate(ctx, tok, spec)
	if err != nil {
		return nil, fmt.Errorf("create snapshot %s of %s: %w", spec.Name, spec.Collection, err)
	}
	return s, nil
}

func (m *Manager) startCreate(ctx context.Context, tok request.Token, spec CreateSpec) (*snapshot.Record, error) {
	if err := catalog.CheckName("name", spec.Name); err != nil {
		return nil, err
	}
	if err := checkLabels(spec.Labels, maxLabels); err != nil {
		return nil, err
	}
	known, err := request.Find(ctx, m.kv, tok)
	if err != nil {
		return nil, err
	}
	if known != nil {
		return m.join(ctx, tok, known, spec.NoWait)
	}
	if err := m.checkExpiry(ctx, spec.ExpireTime); err != nil {
		return nil, err
	}
	if spec.TTL < 0 || spec.TTL > maxExpiry {
		return nil, &catalog.InvalidError{Field: "ttl", Problem: fmt.Sprintf("%v is not 0 to 100 years", spec.TTL)}
	}
	if spec.TTL > 0 { // commit stamps the start of the ttl: fail early without a trusted clock
		if _, err := m.clock.Stamp(ctx); err != nil {
			return nil, fmt.Errorf("read the clock for the ttl: %w", err)
		}
	}
	collection, err := m.catalog.Resolve(ctx, spec.Collection) // once: the name may move to another collection
	if err != nil {
		return nil, err
	}
	spec.Collection = catalog.Ref{ID: collection}
	if len(spec.MinCut) > 0 {
		if err := m.waitForCheckpoints(ctx, spec.Collection, spec.MinCut); err != nil {
			return nil, err
		}
	}
	c := &creation{spec: spec, tok: tok, begun: make(chan struct{}), ended: make(chan struct{})}
	select {
	case <-m.running:
	default:
		return nil, ErrStopping
	}
	select {
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrOverloaded, ctx.Err())
	case <-m.stopped:
		return nil, ErrStopping
	case m.starting <- c:
	}
	wait := c.ended
	if spec.NoWait {
		wait = c.begun
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-wait:
	}
	if spec.NoWait && c.snap != nil {
		return c.snap, nil // the create continues and may still set c.err
	}
	if c.snap == nil { // begin failed, possibly because another call with the token succeeded
		known, err := request.Resolve(ctx, m.kv, tok, c.err)
		if known != nil {
			return m.join(ctx, tok, known, spec.NoWait)
		}
		return nil, err
	}
	return c.last, c.err
}

// errTokenTaken means that begin lost to another call with the same token.
var errTokenTaken = errors.New("request token taken")

// join waits for the create of a token, on whichever replica it runs, and abandons
// it when its pending key is gone.
func (m *Manager) join(
	ctx context.Context, tok request.Token, known *request.Record, noWait bool,
) (*snapshot.Record, error) {
	for !known.Done {
		s, err := m.awaitEnd(ctx, known.ID, noWait)
		if err != nil {
			return nil, fmt.Errorf("wait for snapshot %d: %w", known.ID, err)
		}
		if s != nil {
			return s, nil
		}
		// The transaction that ended the create also completed the token.
		if known, err = request.Find(ctx, m.kv, tok); err != nil {
			return nil, err
		}
		if known == nil {
			return nil, fmt.Errorf("%w: its request token is gone", ErrCreateAborted)
		}
	}
	if known.ErrorReason != "" {
		return nil, terminalError(known.ErrorReason, known.ErrorText)
	}
	return snapshot.Decode(meta.KeyValue{Key: keys.Snapshot(known.ID), Value: known.Result, ModRevision: known.Revision})
}

// awaitEnd waits until a snapshot is no longer PENDING, and abandons it when its
// pending key is gone. It then returns nil. With noWait it returns the record if the
// pending key exists.
func (m *Manager) awaitEnd(ctx context.Context, id int64, noWait bool) (*snapshot.Record, error) {
	var waiting *waiter
	for attempt := 0; ; attempt++ {
		if err := meta.Pause(ctx, min(attempt, maxAttempts)); err != nil {
			return nil, err
		}
		s, err := m.reader.Record(ctx, id)
		if err != nil || s == nil || s.State != snapshot.Pending {
			return nil, err
		}
		pending := keys.Pending(s.Collection, s.ID)
		if waiting == nil { // joins before the key is read, so that no change is missed
			waiting = m.view.pending.join(pending)
			defer waiting.leave()
		}
		_, alive, _, err := m.kv.Get(ctx, pending)
		switch {
		case err != nil:
			return nil, err
		case alive && noWait:
			return s, nil
		case alive:
			if err := waiting.wait(ctx); err != nil {
				return nil, err
			}
			continue
		}
		err = m.abandon(ctx, s)
		if err == nil {
			m.log.Info("snapshot abandoned by a repeated create: its creator is gone",
				zap.Int64("snapshot", s.ID), zap.String("name", s.Name))
			return nil, nil //nolint:nilnil // the create has ended
		}
		if !errors.Is(err, errChanged) {
			return nil, err
		}
	}
}

// create executes one create from begin to end. ctx is the replica's.
func (m *Manager) create(ctx context.Context, c *creation) {
	began := m.o.Now()
	defer close(c.ended)
	ctx, cancel := context.WithTimeout(ctx, m.o.CreateTimeout)
	defer cancel()
	if err := m.reserve(ctx, c); err != nil {
		c.err = err
		close(c.begun)
		return
	}
	defer c.memory.end()
	lease, err := m.begin(ctx, c)
	if err != nil {
		c.err = err
		close(c.begun)
		return
	}
	close(c.begun)
	log := m.log.With(zap.Int64("snapshot", c.snap.ID), zap.String("name", c.snap.Name),
		zap.Int64("collection", c.snap.Collection))
	log.Info("snapshot pending")
	// However the create ends, its lease is revoked.
	defer func() {
		if err := lease.end(context.WithoutCancel(ctx)); err != nil {
			log.Warn("lease of the create not revoked; it expires by itself", zap.Error(err))
		}
	}()
	next, err := m.captureAndWrite(ctx, c, lease)
	if err == nil {
		c.last, err = m.commit(ctx, c, next, lease)
	}
	if err == nil {
		log.Info("snapshot committed", zap.Int64("segments", c.last.Totals.Segments), zap.Int64("files", c.last.Totals.Files),
			zap.Int64("bytes", c.last.Totals.Bytes), zap.Int64("catalog_revision", c.last.CatalogRevision),
			zap.Duration("took", m.o.Now().Sub(began)))
		return
	}
	if errors.Is(err, errUndecided) {
		c.err = err
		return
	}
	cause := err
	reason, err := terminalReason(err)
	if reason == "CREATE_ABORTED" && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("%w within %v", err, m.o.CreateTimeout)
	}
	c.err = err
	// Given up even if the replica stops: the name is then free at once.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	giveUpErr := m.giveUp(ctx, c.snap, reason, err.Error(), nil)
	switch {
	case giveUpErr == nil, errors.Is(giveUpErr, errChanged): // by this replica, or earlier by the leader
		log.Info("snapshot given up", zap.String("reason", reason), zap.Error(cause))
	default:
		c.err = fmt.Errorf("%w: %w", errUndecided, giveUpErr)
		log.Warn("snapshot not given up; left to the leader", zap.NamedError("cause", cause), zap.Error(giveUpErr))
	}
}

// reserve waits until memory for the create is free. It precedes begin, because a
// waiting create does not renew its lease.
func (m *Manager) reserve(ctx context.Context, c *creation) (err error) {
	n, first, err := m.catalog.CountSegments(ctx, c.spec.Collection.ID)
	if err != nil {
		return err
	}
	c.segments = n
	c.memory, err = m.memory.reserve(ctx, n, first)
	return err
}

// createLease is the lease of one create, renewed while the create makes progress.
type createLease struct {
	kv       meta.KV
	id       meta.LeaseID
	now      func() time.Time
	jitter   func() float64 // see [meta.Backoff]
	interval time.Duration  // between renewals
	mu       sync.Mutex
	renewed  time.Time
}

// advance records progress and renews the lease when due. It fails if the lease has
// expired; the create is then abandoned. Concurrent calls are safe.
func (l *createLease) advance(ctx context.Context) error {
	l.mu.Lock()
	now := l.now()
	due := now.Sub(l.renewed) >= l.interval || now.Before(l.renewed)
	if due {
		l.renewed = now
	}
	l.mu.Unlock()
	if !due {
		return ctx.Err()
	}
	err := l.kv.KeepAlive(ctx, l.id)
	if errors.Is(err, meta.ErrLeaseNotFound) {
		return fmt.Errorf("%w: it made no progress for longer than its lease lasts", ErrCreateAborted)
	}
	if err != nil {
		l.mu.Lock()
		l.renewed = l.renewed.Add(-l.interval) // the next call renews again
		l.mu.Unlock()
	}
	return ctx.Err() // other errors of the store are left to the calls that need its answer
}

// persist repeats do while a store does not answer, until ctx ends, and renews the
// lease meanwhile. When ctx ends it returns the store's error.
func (l *createLease) persist(ctx context.Context, do func() error) error {
	pauses := meta.Backoff{Rand: l.jitter}
	for {
		err := do()
		if !errors.Is(err, meta.ErrUnavailable) && !errors.Is(err, object.ErrUnavailable) {
			return err
		}
		if pauses.Wait(ctx) != nil {
			return err
		}
		if gone := l.advance(ctx); gone != nil && ctx.Err() == nil {
			return gone
		}
	}
}

// end revokes the lease.
func (l *createLease) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return l.kv.Revoke(ctx, l.id)
}

// begin makes the snapshot durable as PENDING. On success the caller must end the
// lease; on an error begin has ended it.
func (m *Manager) begin(ctx context.Context, c *creation) (_ *createLease, err error) {
	granted := m.o.Now()
	id, err := m.kv.Grant(ctx, m.o.LeaseTTL)
	if err != nil {
		return nil, fmt.Errorf("lease for the create: %w", err)
	}
	lease := &createLease{
		kv: m.kv, id: id, now: m.o.Now, jitter: m.o.Jitter, interval: min(m.o.LeaseTTL/3, time.Second), renewed: granted,
	}
	sent := false // whether a begin without an answer was sent
	defer func() {
		if err == nil {
			return
		}
		// Without its lease, a begin that was sent can no longer take effect. If none
		// was sent, no key is under the lease, and it may expire.
		if endErr := lease.end(context.WithoutCancel(ctx)); endErr != nil && sent {
			err = fmt.Errorf("%w: %w; %w", errUndecided, endErr, err)
		}
	}()
	snapshot, err := m.catalog.NextID(ctx)
	if err != nil {
		return nil, err
	}
	op, err := record.NewOp(m.o.Rand)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, m.o.LeaseTTL)
	defer cancel()
	pauses := meta.Backoff{Rand: m.o.Jitter}
	for attempt := 0; attempt < maxAttempts; {
		s, err := m.tryBegin(ctx, c, snapshot, op, lease)
		switch {
		case err == nil && s != nil:
			c.snap = s
			return lease, nil
		case err == nil: // the collection changed
			attempt++
			err = meta.Pause(ctx, attempt)
		case errors.Is(err, errUndecided):
			sent = true
			if pauses.Wait(ctx) == nil {
				err = nil
			} else if !errors.Is(err, meta.ErrUnavailable) { // ctx ended in the call
				err = fmt.Errorf("%w: %w", meta.ErrUnavailable, err)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: the collection keeps changing", meta.ErrConflict)
}

// tryBegin sends the begin transaction of a snapshot id. It may be repeated with the
// same id, op and lease. It returns nil when the collection changed, and errUndecided
// when the store did not answer.
func (m *Manager) tryBegin(
	ctx context.Context, c *creation, id int64, op string, lease *createLease,
) (*snapshot.Record, error) {
	col, err := m.catalog.Collection(ctx, c.spec.Collection)
	if errors.Is(err, meta.ErrUnavailable) {
		return nil, fmt.Errorf("%w: %w", errUndecided, err)
	}
	if err != nil {
		return nil, err
	}
	if col.State != catalog.Active {
		return nil, col.CheckActive()
	}
	s := &snapshot.Record{
		ID: id, Name: c.spec.Name, Collection: col.ID, DB: col.DB, CollectionName: col.Name, State: snapshot.Pending,
		Description: c.spec.Description, Labels: c.spec.Labels, CreateTime: m.clock.Display(), TTL: c.spec.TTL,
		ExpireTime: c.spec.ExpireTime, Store: m.o.SnapshotStore,
		RequestKey: c.tok.Key(), Op: op,
	}
	value := snapshot.Encode(s, s.Op)
	if err := checkRecordSize(value); err != nil {
		return nil, err
	}
	name := keys.SnapshotName(m.scope(s.Collection), s.Name)
	pending := record.Encode(&storagev1.Pending{Format: record.Format, Replica: m.o.Replica})
	txn := meta.Txn{
		Name: "create.begin",
		If: slices.Concat(
			[]meta.Cond{
				meta.Absent(keys.Snapshot(s.ID)), meta.Absent(name), meta.Unchanged(keys.Collection(col.ID), col.Revision),
			},
			c.tok.Unused()),
		Then: slices.Concat(
			[]meta.Op{
				meta.Put(name, record.Encode(&storagev1.Name{Format: record.Format, Id: s.ID})),
				meta.Put(keys.Snapshot(s.ID), value),
				meta.PutLeased(keys.Pending(s.Collection, s.ID), pending, lease.id),
				meta.Get(keys.Epoch),
			},
			c.tok.Begin(s.ID)),
		Else: []meta.Op{meta.Get(keys.Snapshot(s.ID)), meta.Get(name)},
	}
	if c.tok.IsSet() {
		txn.Else = append(txn.Else, meta.Get(c.tok.Key()))
	}
	res, err := m.kv.Txn(ctx, txn)
	switch {
	case errors.Is(err, meta.ErrLeaseNotFound):
		return nil, fmt.Errorf("%w: its lease expired before it began", ErrCreateAborted)
	case meta.Refused(err):
		return nil, err
	case err != nil:
		if now, readErr := m.reader.Record(ctx, s.ID); readErr == nil && now != nil {
			return checkBegun(now, op)
		}
		return nil, fmt.Errorf("%w: %w", errUndecided, err)
	case res.Succeeded:
		s.Revision, s.Order = res.Revision, res.Revision
		s.History = epoch.History(res.Ranges[0])
		return s, nil
	case len(res.Ranges[0]) > 0: // an earlier begin was applied
		now, err := snapshot.Decode(res.Ranges[0][0])
		if err != nil {
			return nil, err
		}
		return checkBegun(now, op)
	case c.tok.IsSet() && len(res.Ranges[2]) > 0:
		return nil, errTokenTaken
	case len(res.Ranges[1]) > 0:
		return nil, fmt.Errorf("%w: %q; choose another name, or drop it first", ErrSnapshotExists, s.Name)
	}
	return nil, nil //nolint:nilnil // the collection changed
}

// checkBegun returns the record of a begin without an answer, or an error if that
// create has ended. A record with another op belongs to another create: the metadata
// store was rolled back unnoticed and allocated the id twice.
func checkBegun(s *snapshot.Record, op string) (*snapshot.Record, error) {
	if s.State == snapshot.Pending && s.Op != op {
		return nil, fmt.Errorf("%w: another create has the id %d", meta.ErrConflict, s.ID)
	}
	if s.State != snapshot.Pending {
		return nil, fmt.Errorf("%w: its lease expired before its begin was answered", ErrCreateAborted)
	}
	return s, nil
}

// errUndecided means that the outcome of a transaction is unknown. It wraps the
// store's error, which reports this to the caller. Leases and the leader then decide.
var errUndecided = errors.New("outcome unknown")
