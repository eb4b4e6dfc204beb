package manager

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/crashpoint"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// How a snapshot is written.
const (
	chunkSegments   = 2500    // records that make one manifest
	chunkBytes      = 8 << 20 // of records that do, if these are fewer
	chunksInFlight  = 2       // manifests being written at once
	advanceSegments = 64      // after which a create has come a step further
	captureAttempts = 3       // when the revision is compacted in mid-read
	putAttempts     = 5       // of one object, of those that the store answers
	verifyInFlight  = 16      // files looked at, at once, for each manifest
	maxStraddling   = 10      // segments that an error names
)

// endTimeout bounds the end of a create that failed, timed out or is stopped.
const endTimeout = 10 * time.Second

// creation is a create from its hand-over to Run until its end.
type creation struct {
	spec CreateSpec
	tok  request.Token

	segments int64 // of the collection, before the create began
	memory   *reservation
	revision int64 // to capture at; 0: the newest once the create has begun

	begun chan struct{} // closed when the snapshot is durable as PENDING, or err is set
	ended chan struct{} // closed at the end

	// Once begun is closed snap may be read: the PENDING record, or nil when there
	// is none. Once ended is closed also last, the COMMITTED record, and err; err
	// already after begun if snap is nil.
	snap, last *Snapshot
	err        error
}

// Create captures a collection. The work goes on when ctx ends; the same token
// joins it.
func (m *Manager) Create(ctx context.Context, tok request.Token, spec CreateSpec) (*Snapshot, error) {
	s, err := m.startCreate(ctx, tok, spec)
	if err != nil {
		return nil, fmt.Errorf("create snapshot %s of %s: %w", spec.Name, spec.Collection, err)
	}
	return s, nil
}

func (m *Manager) startCreate(ctx context.Context, tok request.Token, spec CreateSpec) (*Snapshot, error) {
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
	if spec.TTL > 0 { // commit stamps; without a trusted clock nothing begins
		if _, err := m.clock.Stamp(ctx); err != nil {
			return nil, fmt.Errorf("the time that the ttl begins at: %w", err)
		}
	}
	collection, err := m.catalog.Resolve(ctx, spec.Collection) // once
	if err != nil {
		return nil, err
	}
	spec.Collection = catalog.Ref{ID: collection}
	if len(spec.MinCut) > 0 {
		if err := m.awaitCut(ctx, spec.Collection, spec.MinCut); err != nil {
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
		return c.snap, nil // the create goes on, and with it c.err
	}
	if c.snap == nil { // begin failed: perhaps another call with the token was first
		known, err := m.wasFirst(ctx, tok, c.err)
		if known != nil {
			return m.join(ctx, tok, known, spec.NoWait)
		}
		return nil, err
	}
	return c.last, c.err
}

// errTokenTaken means that begin lost to another call with the same token.
var errTokenTaken = errors.New("request token taken")

// join waits for the create that a token stands for, wherever it runs, and ends
// it when its pending key is gone.
func (m *Manager) join(ctx context.Context, tok request.Token, known *request.Record, noWait bool) (*Snapshot, error) {
	for !known.Done {
		s, err := m.awaitEnd(ctx, known.ID, noWait)
		if err != nil {
			return nil, fmt.Errorf("wait for snapshot %d: %w", known.ID, err)
		}
		if s != nil {
			return s, nil
		}
		// The transaction that ended the create ended the token with it.
		if known, err = request.Find(ctx, m.kv, tok); err != nil {
			return nil, err
		}
		if known == nil {
			return nil, fmt.Errorf("%w: its request token is gone", ErrCreateAborted)
		}
	}
	if known.ErrorReason != "" {
		return nil, endingError(known.ErrorReason, known.ErrorText)
	}
	return decode(meta.KeyValue{Key: keys.Snapshot(known.ID), Value: known.Result, ModRevision: known.Revision})
}

// awaitEnd waits until a snapshot is not PENDING any more, and abandons it when
// its pending key is gone. With noWait it returns the record while the pending key
// is there.
func (m *Manager) awaitEnd(ctx context.Context, id int64, noWait bool) (*Snapshot, error) {
	var waiting *waiter
	for attempt := 0; ; attempt++ {
		if err := meta.Pause(ctx, min(attempt, maxAttempts)); err != nil {
			return nil, err
		}
		s, err := m.read(ctx, id)
		if err != nil || s == nil || s.State != Pending {
			return nil, err
		}
		pending := keys.Pending(s.Collection, s.ID)
		if waiting == nil { // the first time; before the key is read
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
			m.log.Info("snapshot given up at a repeat: its creator is gone", zap.Int64("snapshot", s.ID), zap.String("name", s.Name))
			return nil, nil //nolint:nilnil // it has ended
		}
		if !errors.Is(err, errChanged) {
			return nil, err
		}
	}
}

// abandon gives up a create whose pending key is gone: it can commit no more. It
// is errChanged when the key is there, or the record is not as it was read. fence
// is what the leader compares besides.
func (m *Manager) abandon(ctx context.Context, s *Snapshot, fence ...meta.Cond) error {
	text := fmt.Sprintf("%v: the replica that created %s died, or did not advance for longer than its lease lasts", ErrCreateAborted, s)
	return m.giveUp(ctx, s, "CREATE_ABORTED", text, append(fence, meta.Absent(keys.Pending(s.Collection, s.ID))))
}

// endings are the reasons for which a create ends badly, as its token and its
// record keep them. Stored: append only.
var endings = []struct {
	err    error
	reason string
}{
	{catalog.ErrCollectionNotFound, "COLLECTION_NOT_FOUND"},
	{catalog.ErrCollectionNotActive, "COLLECTION_NOT_ACTIVE"},
	{catalog.ErrLimitExceeded, "LIMIT_EXCEEDED"},
	{ErrCheckpointMissing, "CHECKPOINT_MISSING"},
	{ErrNotExact, "NOT_EXACT"},
	{ErrFileMissing, "FILE_MISSING"},
	{ErrCatalogCompacted, "CATALOG_COMPACTED"},
	{object.ErrFull, "STORE_FULL"},
	{object.ErrDenied, "OBJECT_STORE_DENIED"},
	{object.ErrMisconfigured, "OBJECT_STORE_MISCONFIGURED"},
	{ErrCreateAborted, "CREATE_ABORTED"},
}

// endingReason is what is kept of err; an error that is no reason of its own
// becomes ErrCreateAborted, for a create that was given up does not come back.
func endingReason(err error) (reason string, as error) {
	if full, ok := errors.AsType[*object.FullError](err); ok {
		return "STORE_FULL", full // its text, which a repeat gets, is complete
	}
	for _, e := range endings {
		if errors.Is(err, e.err) {
			return e.reason, err
		}
	}
	switch { // whose texts tell of addresses
	case errors.Is(err, meta.ErrUnavailable):
		err = fmt.Errorf("%w: the metadata store did not answer", ErrCreateAborted)
	case errors.Is(err, object.ErrUnavailable):
		err = fmt.Errorf("%w: the object store did not answer", ErrCreateAborted)
	default:
		err = fmt.Errorf("%w: %w", ErrCreateAborted, err)
	}
	return "CREATE_ABORTED", err
}

func endingError(reason, text string) error {
	if full, ok := object.ParseFull(text); ok && reason == "STORE_FULL" {
		return full
	}
	for _, e := range endings {
		if e.reason == reason {
			return &ended{text: text, err: e.err}
		}
	}
	return &ended{text: text, err: ErrCreateAborted}
}

// ended is the error of a create that ended before.
type ended struct {
	text string
	err  error
}

func (e *ended) Error() string { return e.text }
func (e *ended) Unwrap() error { return e.err }

// awaitCut waits until the collection's checkpoints are where want has them.
func (m *Manager) awaitCut(ctx context.Context, ref catalog.Ref, want []catalog.Checkpoint) error {
	col, err := m.catalog.Collection(ctx, ref)
	if err != nil {
		return err
	}
	seen := map[int]bool{}
	for i, cp := range want {
		if cp.Shard < 0 || cp.Shard >= col.Shards() || seen[cp.Shard] {
			return &catalog.InvalidError{
				Field:   fmt.Sprintf("min_cut[%d].shard", i),
				Problem: fmt.Sprintf("%d is not a shard of %s, or occurs twice; it has 0 to %d", cp.Shard, &col, col.Shards()-1),
			}
		}
		seen[cp.Shard] = true
	}
	wait := ctx
	if deadline, ok := ctx.Deadline(); ok {
		// Ends a little earlier, so that the answer arrives in time to be read.
		left := time.Until(deadline)
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, left-min(left/5, 500*time.Millisecond))
		defer cancel()
	}
	waiting := m.cuts.await(col.ID) // before they are read
	defer waiting.leave()
	for {
		view, err := m.catalog.At(ctx, col.ID, 0)
		if err != nil {
			return err
		}
		behind := laggards(&view, want)
		if len(behind) == 0 {
			return nil
		}
		if view.Collection.State != catalog.Active {
			return view.Collection.CheckActive()
		}
		err = waiting.wait(wait)
		if wait.Err() != nil && (ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded)) {
			text := strings.Join(behind[:min(len(behind), maxNamed)], ", ")
			if more := len(behind) - maxNamed; more > 0 {
				text += fmt.Sprintf(", and %d more", more)
			}
			return fmt.Errorf("%w: %s; flush these channels, or ask for less", ErrCutNotReached, text)
		}
		if err != nil {
			return err
		}
	}
}

// laggards names the channels whose checkpoint is not where want has it.
func laggards(v *catalog.View, want []catalog.Checkpoint) []string {
	var behind []string
	for _, w := range want {
		cp, ok := v.Checkpoints[w.Shard]
		switch {
		case !ok:
			behind = append(behind, fmt.Sprintf("shard %d (%q) has no checkpoint, wanted %d",
				w.Shard, v.Collection.Channel(w.Shard), w.Position.Timestamp))
		case cp.Position.Timestamp < w.Position.Timestamp:
			behind = append(behind, fmt.Sprintf("shard %d (%q) is at %d, wanted %d",
				w.Shard, v.Collection.Channel(w.Shard), cp.Position.Timestamp, w.Position.Timestamp))
		}
	}
	return behind
}

// create is a create from begin to end. ctx is that of the replica.
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
	log := m.log.With(zap.Int64("snapshot", c.snap.ID), zap.String("name", c.snap.Name), zap.Int64("collection", c.snap.Collection))
	log.Info("snapshot pending")
	// The lease ends with the create, in whatever way that ends.
	defer func() {
		if err := lease.end(context.WithoutCancel(ctx)); err != nil {
			log.Warn("the create's lease could not be revoked and runs out by itself", zap.Error(err))
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
	reason, err := endingReason(err)
	if reason == "CREATE_ABORTED" && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("%w within %v", err, m.o.CreateTimeout)
	}
	c.err = err
	// Given up even when the replica stops, so that the name is free at once.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	giveUpErr := m.giveUp(ctx, c.snap, reason, err.Error(), nil)
	switch {
	case giveUpErr == nil, errors.Is(giveUpErr, errChanged): // by us, or by the leader before
		log.Info("snapshot given up", zap.String("reason", reason), zap.Error(cause))
	default:
		c.err = fmt.Errorf("%w: %w", errUndecided, giveUpErr)
		log.Warn("snapshot could not be given up; the leader will", zap.NamedError("cause", cause), zap.Error(giveUpErr))
	}
}

// reserve waits until there is memory for the create. It comes before begin, for
// a create that waits does not advance.
func (m *Manager) reserve(ctx context.Context, c *creation) (err error) {
	n, first, err := m.catalog.CountSegments(ctx, c.spec.Collection.ID)
	if err != nil {
		return err
	}
	c.segments = n
	c.memory, err = m.memory.reserve(ctx, n, first)
	return err
}

// createLease is the lease of one create. It lives while the create advances.
type createLease struct {
	kv       meta.KV
	id       meta.LeaseID
	now      func() time.Time
	jitter   func() float64 // as [meta.Backoff] wants it
	interval time.Duration
	mu       sync.Mutex
	renewed  time.Time
}

// advance says that the create has come a step further, and renews the lease
// when that is due. It is an error when the lease is gone: so is the create.
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
		return fmt.Errorf("%w: it did not advance for longer than its lease lasts", ErrCreateAborted)
	}
	if err != nil {
		l.mu.Lock()
		l.renewed = l.renewed.Add(-l.interval) // the next step tries again
		l.mu.Unlock()
	}
	return ctx.Err() // a store that does not answer is seen by those who need it
}

// persist repeats do while a store does not answer, until ctx ends: a create that
// waits lives. The error is then that of the store.
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

func (l *createLease) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	atEndLease.Before()
	defer atEndLease.After()
	return l.kv.Revoke(ctx, l.id)
}

// begin makes the snapshot durable as PENDING. On success the lease is the
// caller's to end; on an error it is ended.
func (m *Manager) begin(ctx context.Context, c *creation) (_ *createLease, err error) {
	granted := m.o.Now()
	id, err := m.kv.Grant(ctx, m.o.LeaseTTL)
	if err != nil {
		return nil, fmt.Errorf("lease for the create: %w", err)
	}
	lease := &createLease{
		kv: m.kv, id: id, now: m.o.Now, jitter: m.o.Jitter, interval: min(m.o.LeaseTTL/3, time.Second), renewed: granted,
	}
	sent := false // a begin without an answer
	defer func() {
		if err == nil {
			return
		}
		// What was sent cannot happen any more, unless it has. Else nothing is
		// under the lease, and it may run out.
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
	return nil, fmt.Errorf("%w: the collection keeps changing", catalog.ErrConflict)
}

// tryBegin is the begin transaction of a snapshot id, which may be sent again
// with the same id, op and lease. It returns nil when the collection changed, and
// errUndecided when there is no answer.
func (m *Manager) tryBegin(ctx context.Context, c *creation, id int64, op string, lease *createLease) (*Snapshot, error) {
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
	s := &Snapshot{
		ID: id, Name: c.spec.Name, Collection: col.ID, DB: col.DB, CollectionName: col.Name, State: Pending,
		Description: c.spec.Description, Labels: c.spec.Labels, CreateTime: m.clock.Display(), TTL: c.spec.TTL,
		ExpireTime: c.spec.ExpireTime, Store: m.o.SnapshotStore,
		requestKey: c.tok.Key(), op: op,
	}
	value := encode(s, s.op)
	if err := checkRecordSize(value); err != nil {
		return nil, err
	}
	name := keys.SnapshotName(m.scope(s.Collection), s.Name)
	pending := record.Encode(&storagev1.Pending{Format: record.Format, Replica: m.o.Replica})
	txn := meta.Txn{
		If: slices.Concat(
			[]meta.Cond{meta.Absent(keys.Snapshot(s.ID)), meta.Absent(name), meta.Unchanged(keys.Collection(col.ID), col.Revision)},
			c.tok.Absent()),
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
	if c.tok.Given() {
		txn.Else = append(txn.Else, meta.Get(c.tok.Key()))
	}
	atBegin.Before()
	res, err := m.kv.Txn(ctx, txn)
	atBegin.After()
	switch {
	case errors.Is(err, meta.ErrLeaseNotFound):
		return nil, fmt.Errorf("%w: its lease ran out before it began", ErrCreateAborted)
	case meta.Refused(err):
		return nil, err
	case err != nil:
		if now, readErr := m.read(ctx, s.ID); readErr == nil && now != nil {
			return begun(now, op)
		}
		return nil, fmt.Errorf("%w: %w", errUndecided, err)
	case res.Succeeded:
		s.Revision, s.Order = res.Revision, res.Revision
		s.history = epoch.History(res.Ranges[0])
		return s, nil
	case len(res.Ranges[0]) > 0: // one that was sent before
		now, err := decode(res.Ranges[0][0])
		if err != nil {
			return nil, err
		}
		return begun(now, op)
	case c.tok.Given() && len(res.Ranges[2]) > 0:
		return nil, errTokenTaken
	case len(res.Ranges[1]) > 0:
		return nil, fmt.Errorf("%w: %q; choose another name, or drop it first", ErrSnapshotExists, s.Name)
	}
	return nil, nil //nolint:nilnil // the collection changed
}

// begun returns the record of a begin without an answer, unless it has ended. A
// record of another operation is of another create: the id was handed out twice, by
// a metadata store that went back in time unnoticed.
func begun(s *Snapshot, op string) (*Snapshot, error) {
	if s.State == Pending && s.op != op {
		return nil, fmt.Errorf("%w: another create has the id %d", catalog.ErrConflict, s.ID)
	}
	if s.State != Pending {
		return nil, fmt.Errorf("%w: its lease ran out before its begin was answered", ErrCreateAborted)
	}
	return s, nil
}

// errUndecided means that it is not known how a transaction ended. The store's
// error that it wraps says so to the caller; leases and the leader decide.
var errUndecided = errors.New("outcome unknown")

// captureAndWrite reads the collection at one revision and writes what it says,
// the metadata last. It returns the record as commit will write it.
func (m *Manager) captureAndWrite(ctx context.Context, c *creation, lease *createLease) (*Snapshot, error) {
	used := 0 // manifests that were begun: a key is not used twice
	for compacted := 0; ; {
		next, written, err := m.capture(ctx, c, lease, used)
		used += written
		if !errors.Is(err, meta.ErrCompacted) {
			return next, err
		}
		if compacted++; compacted == captureAttempts {
			return nil, fmt.Errorf("%w in each of %d captures; compact less often, or try again", ErrCatalogCompacted, compacted)
		}
	}
}

// capture is one capture, whose manifests are numbered from first on. It also
// returns how many it began.
func (m *Manager) capture(ctx context.Context, c *creation, lease *createLease, first int) (next *Snapshot, begun int, err error) {
	var view catalog.View
	err = lease.persist(ctx, func() (err error) {
		view, err = m.catalog.At(ctx, c.snap.Collection, c.revision)
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	if view.Collection.State != catalog.Active {
		return nil, 0, view.Collection.CheckActive()
	}
	w := &snapshotWriter{
		m: m, spec: &c.spec, snap: c.snap, view: &view, cutter: newCutter(&view), lease: lease, first: first,
		room: int(min(c.segments, chunkSegments)), memory: c.memory,
	}
	next, err = w.run(ctx)
	return next, len(w.chunks), err
}

// snapshotWriter writes one capture. One goroutine reads the records of segments
// and deals them out in chunks; one for each chunk makes a manifest of it. That
// decodes, captures and encodes one segment after another, so that no more than
// the records and the manifests are ever held.
type snapshotWriter struct {
	m      *Manager
	spec   *CreateSpec
	snap   *Snapshot
	view   *catalog.View
	cutter *cutter
	lease  *createLease

	first  int // number of the first chunk
	room   int // records to make room for in a chunk
	memory *reservation
	chunks []*chunk

	// What the chunks come to.
	totals     segment.Totals
	straddling []int64 // the first few
	lacking    []int64 // likewise
	lackingAll int     // how many there are
	refsFile   manifest.RefsFile
	refs       *manifest.Refs // in that file
}

// chunk is some segments, in the order of their ids.
type chunk struct {
	number  int // of the manifest
	records []meta.KeyValue
	memory  charge // of the records, then of the manifest

	// What is captured of them. Its goroutine sets it before it closes encoded,
	// which it does unless it fails.
	totals     segment.Totals
	straddling []int64 // the first few
	lacking    []int64 // likewise
	lackingAll int     // how many there are
	refs       manifest.Refs
	digest     manifest.Digest
	encoded    chan struct{}
}

// add counts what is captured of a segment.
func (c *chunk) add(col *catalog.Collection, got *captured) {
	c.totals.Add(&got.Segment)
	addRefs(&c.refs, col, &got.Segment)
	if got.straddles {
		if c.totals.Straddling++; len(c.straddling) < maxStraddling {
			c.straddling = append(c.straddling, got.ID)
		}
	}
}

func (w *snapshotWriter) run(ctx context.Context) (*Snapshot, error) {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(1 + chunksInFlight)
	group.Go(func() error {
		// When not all is read the capture starts over, and needs the key of the
		// references.
		if err := w.readAll(groupCtx, group); err != nil {
			return err
		}
		return w.writeRefs(groupCtx)
	})
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if w.spec.RequireExact && w.totals.Straddling > 0 {
		return nil, fmt.Errorf("%w: %d of them, the first are %v; flush them, or do without require_exact",
			ErrNotExact, w.totals.Straddling, w.straddling)
	}
	return w.finish(ctx)
}

// readAll reads the records, and has each chunk of them written once it is full.
// It waits while chunksInFlight are being written.
func (w *snapshotWriter) readAll(ctx context.Context, group *errgroup.Group) error {
	var c *chunk // that is read
	size := 0
	flush := func() {
		full := c
		w.chunks = append(w.chunks, full)
		c, size = nil, 0
		group.Go(func() error {
			defer full.memory.end()
			return w.write(ctx, full)
		})
	}
	defer func() {
		if c != nil { // not all is read
			c.memory.end()
		}
	}()
	last := "" // key of the record that was read last
	err := w.lease.persist(ctx, func() error {
		_, err := w.m.catalog.ScanRecords(ctx, w.snap.Collection, w.view.Revision, last, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				if c == nil {
					c = &chunk{
						number: w.first + len(w.chunks), records: make([]meta.KeyValue, 0, w.room), memory: charge{of: w.memory},
						encoded: make(chan struct{}),
					}
				}
				if err := c.memory.add(ctx, recordMemory(kv), w.lease.advance); err != nil {
					return err
				}
				c.records = append(c.records, kv)
				if size += len(kv.Value); len(c.records) == chunkSegments || size >= chunkBytes {
					flush()
				}
			}
			last = batch[len(batch)-1].Key
			return w.lease.advance(ctx)
		})
		return err
	})
	if err == nil {
		w.memory.allRead()
	}
	if err == nil && c != nil {
		flush()
	}
	return err
}

// write makes and writes the manifest of a chunk, unless nothing is captured of
// it.
func (w *snapshotWriter) write(ctx context.Context, c *chunk) error {
	data, err := w.encodeVerified(ctx, c)
	if err != nil {
		return err
	}
	c.digest = manifest.Sum(data)
	c.memory.shrink(int64(len(data)))
	close(c.encoded)
	if c.totals.Segments == 0 {
		return nil
	}
	return w.m.putOnce(ctx, atManifest, manifest.ManifestKey(w.snap.Collection, w.snap.ID, c.number), data, w.lease)
}

// encodeVerified is encode, and has the files looked at meanwhile if that is
// wanted.
func (w *snapshotWriter) encodeVerified(ctx context.Context, c *chunk) ([]byte, error) {
	if !w.spec.Verify {
		return w.encode(ctx, c, func(*segment.Segment) {})
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(verifyInFlight)
	data, err := w.encode(ctx, c, func(s *segment.Segment) {
		w.m.verify(ctx, group, w.view.Collection.Roots, s, w.lease)
	})
	if missing := group.Wait(); missing != nil { // which ended encode
		return nil, missing
	}
	return data, err
}

// encode captures the segments of a chunk, shows each to look, and returns the
// manifest.
func (w *snapshotWriter) encode(ctx context.Context, c *chunk, look func(*segment.Segment)) ([]byte, error) {
	end, err := w.m.memory.decode(ctx, c.records, w.lease.advance)
	if err != nil {
		return nil, err
	}
	defer end()
	out := manifest.NewWriter()
	defer out.Close()
	var decoder catalog.Decoder
	for i, kv := range c.records {
		if i%advanceSegments == 0 {
			if err := w.lease.advance(ctx); err != nil {
				return nil, err
			}
		}
		c.records[i] = meta.KeyValue{} // so that its memory can be used again
		s, err := decoder.Decode(w.snap.Collection, kv)
		if err != nil {
			return nil, err
		}
		got, err := w.cutter.capture(s)
		if err != nil {
			return nil, err
		}
		if got.lacking {
			if c.lackingAll++; len(c.lacking) < maxStraddling {
				c.lacking = append(c.lacking, s.ID)
			}
		}
		if !got.in {
			continue
		}
		look(&got.Segment)
		c.add(&w.view.Collection, &got)
		if err := out.Add(&got.Segment); err != nil {
			return nil, err
		}
	}
	c.records = nil
	return out.Finish(), nil
}

// writeRefs adds up what was captured, once all of it is, and writes the
// references.
func (w *snapshotWriter) writeRefs(ctx context.Context) error {
	refs := &manifest.Refs{}
	for _, c := range w.chunks {
		select {
		case <-c.encoded:
		case <-ctx.Done(): // as when a chunk failed
			return ctx.Err()
		}
		w.totals.Segments += c.totals.Segments
		w.totals.Rows += c.totals.Rows
		w.totals.Files += c.totals.Files
		w.totals.Bytes += c.totals.Bytes
		w.totals.Builds += c.totals.Builds
		w.totals.Straddling += c.totals.Straddling
		w.straddling = append(w.straddling, c.straddling[:min(len(c.straddling), maxStraddling-len(w.straddling))]...)
		w.lackingAll += c.lackingAll
		w.lacking = append(w.lacking, c.lacking[:min(len(c.lacking), maxStraddling-len(w.lacking))]...)
		refs.Segments = append(refs.Segments, c.refs.Segments...)
		refs.Builds = append(refs.Builds, c.refs.Builds...)
		refs.Files = append(refs.Files, c.refs.Files...)
		c.refs = manifest.Refs{}
	}
	if w.lackingAll > 0 {
		w.m.log.Warn("the snapshot lacks segments that are FLUSHED with rows and have no file of them: an earlier release "+
			"let them in; give them their files with UpdateSegments, or drop them", zap.Int64("snapshot", w.snap.ID),
			zap.Int("segments", w.lackingAll), zap.Int64s("first", w.lacking))
	}
	sortRefs(refs)
	data, err := manifest.EncodeRefs(refs)
	if err != nil {
		return err
	}
	w.refsFile = manifest.RefsFile{
		File: manifest.RefsName, Digest: manifest.Sum(data),
		Segments: int64(len(refs.Segments)), Builds: int64(len(refs.Builds)), Files: int64(len(refs.Files)),
	}
	w.refs = refs
	return w.m.putOnce(ctx, atRefs, manifest.RefsKey(w.snap.Collection, w.snap.ID), data, w.lease)
}

// finish writes the metadata, and makes the committed record.
func (w *snapshotWriter) finish(ctx context.Context) (*Snapshot, error) {
	next := w.snap.moved(Committed, "")
	next.CatalogRevision, next.Totals, next.beginRev = w.view.Revision, w.totals, w.snap.Revision
	next.DB, next.CollectionName = w.view.Collection.DB, w.view.Collection.Name
	md := describe(next, w.view, w.m.o.Cluster.ID, w.m.o.Release)
	for _, p := range md.Partitions {
		next.Partitions = append(next.Partitions, p.ID)
	}
	for _, ch := range md.Channels {
		next.Cuts = append(next.Cuts, Cut{Shard: ch.Shard, Channel: ch.Name, Timestamp: ch.Cut})
	}
	md.Totals = manifest.Totals{
		Segments: w.totals.Segments, Rows: w.totals.Rows, Files: w.totals.Files, Bytes: w.totals.Bytes,
		Builds: w.totals.Builds, Straddling: w.totals.Straddling,
	}
	var ordinal, build int64
	for _, c := range w.chunks {
		if c.totals.Segments == 0 {
			continue
		}
		md.Manifests = append(md.Manifests, manifest.ManifestFile{
			File: manifest.ManifestName(c.number), Digest: c.digest, FirstOrdinal: ordinal, FirstBuild: build,
			Segments: c.totals.Segments, Rows: c.totals.Rows, Builds: c.totals.Builds, Files: c.totals.Files, Bytes: c.totals.Bytes,
		})
		ordinal, build = ordinal+c.totals.Segments, build+c.totals.Builds
		next.ManifestBytes += c.digest.Length
	}
	md.Refs = w.refsFile
	data, err := manifest.EncodeMetadata(md)
	if err != nil {
		return nil, err
	}
	if err := w.m.putOnce(ctx, atMetadata, manifest.MetadataKey(w.snap.Collection, w.snap.ID), data, w.lease); err != nil {
		return nil, err
	}
	next.Metadata, next.refs = manifest.Sum(data), w.refsFile
	next.ManifestBytes += w.refsFile.Length + int64(len(data))
	w.m.gc.Offer(next.ID, next.Metadata, w.refs)
	return next, nil
}

// verify has group ask the stores for every file of the segment, which it does
// not keep. It waits while group is busy.
func (m *Manager) verify(ctx context.Context, group *errgroup.Group, roots []catalog.Root, s *segment.Segment, lease *createLease) {
	id := s.ID
	for f := range s.AllFiles() {
		file := *f
		group.Go(func() error {
			err := lease.persist(ctx, func() error {
				return pastRefusals(ctx, func() error { return m.verifyFile(ctx, roots[file.Root], &file, id) })
			})
			if err != nil {
				return err
			}
			return lease.advance(ctx)
		})
	}
}

// pastRefusals repeats do while the store refuses in a way that may pass, up to
// putAttempts times: one refusal among the requests of a create does not end it.
func pastRefusals(ctx context.Context, do func() error) (err error) {
	for attempt := range putAttempts {
		if over := meta.Pause(ctx, attempt*attempt*10); over != nil {
			return cmp.Or(err, over)
		}
		if err = do(); !object.IsPassing(err) {
			return err
		}
	}
	return err
}

func (m *Manager) verifyFile(ctx context.Context, root catalog.Root, f *segment.File, id int64) error {
	store, ok := m.o.Stores[root.Store]
	if !ok {
		return fmt.Errorf("%w: object store %q is not configured", ErrFileMissing, root.Store)
	}
	info, err := store.Head(ctx, root.Prefix+f.Path)
	switch {
	case errors.Is(err, object.ErrNotFound):
		return fmt.Errorf("%w: %s/%s of segment %d is not there", ErrFileMissing, root.Store, root.Prefix+f.Path, id)
	case err != nil:
		return err
	}
	if likeness, reason := compareFile(f, info); likeness.Refused() {
		return fmt.Errorf("%w: %s/%s of segment %d: %s", ErrFileMissing, root.Store, root.Prefix+f.Path, id, reason)
	}
	return nil
}

// putOnce writes an object of the snapshot's own. After an answer that is no
// answer, or says that the key is taken, it reads back: equal bytes are what an
// earlier try wrote.
func (m *Manager) putOnce(ctx context.Context, at crashpoint.Point, key string, data []byte, lease *createLease) error {
	err := lease.persist(ctx, func() error {
		var last error
		for attempt := range putAttempts {
			if err := meta.Pause(ctx, attempt*attempt*10); err != nil {
				return cmp.Or(last, err)
			}
			at.Before()
			_, err := m.store.Create(ctx, key, data)
			at.After()
			if err == nil {
				return nil
			}
			last = err
			there, err := object.ReadAll(ctx, m.store, key, int64(len(data)))
			switch {
			case errors.Is(err, object.ErrNotFound) && errors.Is(last, object.ErrInvalidKey):
				return last
			case errors.Is(err, object.ErrUnavailable): // what holds the key is not known
				last = err
			case err != nil:
			case bytes.Equal(there, data):
				return nil
			default: // or it was not read as it is there
				last = fmt.Errorf("%w with other content; snapshotd's prefix must be its own", object.ErrExists)
			}
		}
		return last
	})
	if errors.Is(err, object.ErrExists) && m.o.Epoch != nil && m.isOfAnotherStore(ctx, key, data, lease) {
		m.catalog.ForgetStock(ctx)
		err = m.o.Epoch.Alarm(ctx, key)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	return lease.advance(ctx)
}

// maxEvidence bounds what is read of an object that holds the key of another.
const maxEvidence = 4 << 20

// isOfAnotherStore reports whether the object under a key of a new snapshot proves
// that the snapshot's id was handed out before: it is not data, two reads agree,
// and snapshotd wrote it as an object of that key. An alarm stops the whole
// cluster, so a read that was altered, and an object of another program, are none:
// they fail the create alone.
func (m *Manager) isOfAnotherStore(ctx context.Context, key string, data []byte, lease *createLease) bool {
	var reads [2][]byte
	for i := range reads {
		err := lease.persist(ctx, func() (err error) {
			reads[i], err = object.ReadAll(ctx, m.store, key, maxEvidence)
			return err
		})
		if err != nil {
			return false
		}
	}
	there := reads[0]
	return bytes.Equal(there, reads[1]) && !bytes.HasPrefix(data, there) && manifest.WrittenAs(key, there)
}

// commit makes the snapshot COMMITTED. While there is no answer it sends the same
// transaction again; that it failed is said only once it cannot happen any more.
func (m *Manager) commit(ctx context.Context, c *creation, next *Snapshot, lease *createLease) (*Snapshot, error) {
	op, err := record.NewOp(m.o.Rand)
	if err != nil {
		return nil, err
	}
	next.CommitTime, next.op = m.clock.Display(), op
	if next.TTL > 0 {
		if next.CommitTime, err = m.clock.Stamp(ctx); errors.Is(err, clock.ErrUntrusted) {
			// Its token ends with it, so that another create has to begin.
			return nil, fmt.Errorf("%w: the time that the ttl begins at: %s", ErrCreateAborted, err.Error())
		} else if err != nil {
			return nil, fmt.Errorf("the time that the ttl begins at: %w", err)
		}
		next.ExpireTime = next.CommitTime.Add(next.TTL)
	}
	value := encode(next, op)
	if err := checkRecordSize(value); err != nil {
		return nil, err
	}
	open := false // a commit that was sent has no answer, and may yet happen
	pauses := meta.Backoff{Rand: m.o.Jitter}
	for leases := 0; ; {
		done, err := m.tryCommit(ctx, c, next, value, lease, &open)
		switch {
		case done && err != nil:
			return nil, err
		case done:
			return next, nil
		case errors.Is(err, meta.ErrLeaseNotFound): // that of the result
			if leases++; leases < maxAttempts {
				continue
			}
			err = fmt.Errorf("%w: no lease for the result", ErrCreateAborted)
		case errors.Is(err, meta.ErrUnavailable) && pauses.Wait(ctx) == nil:
			continue
		}
		if open {
			return m.endCommit(ctx, c, next, err)
		}
		return nil, err
	}
}

// tryCommit sends the commit, which fills next in. It says whether that is decided
// for good; err then says why it failed. open is set while it is not known what
// becomes of one that was sent.
func (m *Manager) tryCommit(ctx context.Context, c *creation, next *Snapshot, value []byte, lease *createLease, open *bool) (done bool, err error) {
	if err := lease.advance(ctx); err != nil && !*open {
		return true, err
	}
	var result request.Lease
	if c.tok.Given() {
		if result, err = m.o.Requests.Get(ctx); err != nil {
			return false, err
		}
	}
	atCommit.Before()
	res, err := m.kv.Txn(ctx, meta.Txn{
		If: []meta.Cond{
			meta.Unchanged(keys.Snapshot(next.ID), c.snap.Revision),
			meta.SameKey(keys.Pending(next.Collection, next.ID), c.snap.Revision),
		},
		Then: slices.Concat([]meta.Op{
			meta.Put(keys.Snapshot(next.ID), value),
			meta.Delete(keys.Pending(next.Collection, next.ID)),
			meta.Put(keys.Generation(next.Collection), record.Encode(&storagev1.Generation{Format: record.Format, SnapshotId: next.ID})),
		}, c.tok.End(result, next.ID, value)),
	})
	atCommit.After()
	switch {
	case errors.Is(err, meta.ErrLeaseNotFound):
		m.o.Requests.Forget(ctx, result)
		return false, err
	case meta.Refused(err):
		return false, err
	case err != nil:
		*open = true
		return false, err
	case res.Succeeded:
		next.Revision, next.Order = res.Revision, res.Revision
		return true, nil
	}
	// Refused, and the record says why: another one of ours was applied, or the
	// pending key is gone and none can be any more.
	now, err := m.read(ctx, next.ID)
	if err != nil {
		return false, err
	}
	if now != nil && now.State == Pending {
		return true, fmt.Errorf("%w: its lease ran out before the commit", ErrCreateAborted)
	}
	return true, committedAs(next, now, *open)
}

// committedAs fills next in from its record, nil if there is none, which is not
// PENDING any more. open says whether the commit may have been applied.
func committedAs(next, now *Snapshot, open bool) error {
	switch {
	case now == nil && open:
		return fmt.Errorf("%w: %w: the commit got no answer, and the record is gone", errUndecided, meta.ErrUnavailable)
	case now == nil, now.State == Deleting && now.commitRev == 0:
		return fmt.Errorf("%w: its lease ran out before the commit", ErrCreateAborted)
	case now.State == Deleting: // committed, and dropped since
		next.Revision, next.Order = now.commitRev, now.commitRev
	default: // by us: nobody else commits this id
		*next = *now
	}
	return nil
}

// endCommit ends a create whose commit got no answer in its time. That it failed
// is said only once the commit cannot happen any more.
func (m *Manager) endCommit(ctx context.Context, c *creation, next *Snapshot, cause error) (*Snapshot, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.o.LeaseTTL/3)
	defer cancel()
	_, why := endingReason(cause)
	for pauses := (meta.Backoff{Rand: m.o.Jitter}); ; {
		now, err := m.read(ctx, next.ID)
		if err == nil {
			if now == nil || now.State != Pending {
				return next, committedAs(next, now, true)
			}
			err = m.giveUp(ctx, now, "CREATE_ABORTED", fmt.Sprintf("the commit was taken back: %v", why), nil)
		}
		if err == nil {
			return nil, fmt.Errorf("the commit was taken back: %w", why)
		}
		if pauses.Wait(ctx) != nil {
			m.log.Warn("a commit without an answer is still undecided", zap.Int64("snapshot", c.snap.ID), zap.Error(err))
			return nil, fmt.Errorf("%w: %w: %w", errUndecided, meta.ErrUnavailable, cause)
		}
	}
}

// errChanged means that a record was not as it was read.
var errChanged = errors.New("record changed")

// giveUp moves a PENDING snapshot to DELETING, which frees its name, and stores
// the error under its request token. fence is what a leader compares besides.
func (m *Manager) giveUp(ctx context.Context, s *Snapshot, reason, text string, fence []meta.Cond) error {
	for range maxAttempts {
		op, err := record.NewOp(m.o.Rand)
		if err != nil {
			return err
		}
		// The reason is for people; a record has no room for a long one.
		short := strings.ToValidUTF8(fmt.Sprintf("%.1024s", reason+": "+text), "?")
		txn := meta.Txn{
			If: append([]meta.Cond{meta.Unchanged(keys.Snapshot(s.ID), s.Revision)}, fence...),
			Then: []meta.Op{
				meta.Put(keys.Snapshot(s.ID), encode(s.moved(Deleting, short), op)),
				meta.Delete(keys.SnapshotName(m.scope(s.Collection), s.Name)),
				meta.Delete(keys.Pending(s.Collection, s.ID)),
			},
		}
		var lease request.Lease
		if s.requestKey != "" {
			if lease, err = m.endToken(ctx, s.requestKey, reason, text, &txn); err != nil {
				return err
			}
		}
		atGiveUp.Before()
		res, err := m.kv.Txn(ctx, txn)
		atGiveUp.After()
		switch {
		case errors.Is(err, meta.ErrLeaseNotFound):
			m.o.Requests.Forget(ctx, lease)
		case err != nil:
			return err
		case !res.Succeeded:
			return errChanged
		default:
			return nil
		}
	}
	return errChanged
}

// endToken adds to txn that the token at key ends with an error.
func (m *Manager) endToken(ctx context.Context, key, reason, text string, txn *meta.Txn) (request.Lease, error) {
	kv, found, _, err := m.kv.Get(ctx, key)
	if err != nil || !found {
		return request.Lease{}, err
	}
	lease, err := m.o.Requests.Get(ctx)
	if err != nil {
		return request.Lease{}, err
	}
	end, err := request.Failed(kv, lease, reason, text)
	if err != nil {
		return request.Lease{}, err
	}
	txn.If = append(txn.If, meta.Unchanged(key, kv.ModRevision))
	txn.Then = append(txn.Then, end)
	return lease, nil
}
