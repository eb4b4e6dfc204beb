package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

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
	if c.tok.IsSet() {
		if result, err = m.o.Requests.Get(ctx); err != nil {
			return false, err
		}
	}
	res, err := m.kv.Txn(ctx, meta.Txn{
		Name: "create.commit",
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
			Name: "create.giveup",
			If:   append([]meta.Cond{meta.Unchanged(keys.Snapshot(s.ID), s.Revision)}, fence...),
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
		res, err := m.kv.Txn(ctx, txn)
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
	end, err := request.Fail(kv, lease, reason, text)
	if err != nil {
		return request.Lease{}, err
	}
	txn.If = append(txn.If, meta.Unchanged(key, kv.ModRevision))
	txn.Then = append(txn.Then, end)
	return lease, nil
}
