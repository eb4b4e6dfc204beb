package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// abandon gives up a create whose pending key is gone, which can no longer commit. It
// returns errChanged when the key exists or the record has changed. The leader adds
// its fence.
func (m *Manager) abandon(ctx context.Context, s *snapshot.Record, fence ...meta.Cond) error {
	text := fmt.Sprintf("%v: the replica that created %s died, or made no progress for longer than its lease lasts",
		ErrCreateAborted, s)
	return m.giveUp(ctx, s, "CREATE_ABORTED", text, append(fence, meta.Absent(keys.Pending(s.Collection, s.ID))))
}

// terminalErrors are the errors that end a create, with their reasons as its token
// and its record store them. Stored: append only.
var terminalErrors = []struct {
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

// terminalReason returns the stored reason of err, and the error to return. An error
// without a reason becomes ErrCreateAborted, because a create that was given up cannot
// continue.
func terminalReason(err error) (reason string, as error) {
	if full, ok := errors.AsType[*object.FullError](err); ok {
		return "STORE_FULL", full // terminalError parses its text
	}
	for _, e := range terminalErrors {
		if errors.Is(err, e.err) {
			return e.reason, err
		}
	}
	switch { // the texts of these errors contain addresses
	case errors.Is(err, meta.ErrUnavailable):
		err = fmt.Errorf("%w: the metadata store did not answer", ErrCreateAborted)
	case errors.Is(err, object.ErrUnavailable):
		err = fmt.Errorf("%w: the object store did not answer", ErrCreateAborted)
	default:
		err = fmt.Errorf("%w: %w", ErrCreateAborted, err)
	}
	return "CREATE_ABORTED", err
}

// terminalError returns the error that terminalReason stored.
func terminalError(reason, text string) error {
	if full, ok := object.ParseFull(text); ok && reason == "STORE_FULL" {
		return full
	}
	for _, e := range terminalErrors {
		if e.reason == reason {
			return &storedError{text: text, err: e.err}
		}
	}
	return &storedError{text: text, err: ErrCreateAborted}
}

// storedError is the error of an earlier create, as its token stores it.
type storedError struct {
	text string
	err  error
}

func (e *storedError) Error() string { return e.text }
func (e *storedError) Unwrap() error { return e.err }

// commit makes the snapshot COMMITTED. It repeats the same transaction while the store
// does not answer. It reports a failure only once the commit can no longer take effect.
func (m *Manager) commit(
	ctx context.Context, c *creation, next *snapshot.Record, lease *createLease,
) (*snapshot.Record, error) {
	op, err := record.NewOp(m.o.Rand)
	if err != nil {
		return nil, err
	}
	next.CommitTime, next.Op = m.clock.Display(), op
	if next.TTL > 0 {
		if next.CommitTime, err = m.clock.Stamp(ctx); errors.Is(err, clock.ErrUntrusted) {
			// ErrCreateAborted is the result under the token: the caller begins another create.
			return nil, fmt.Errorf("%w: read the clock for the ttl: %s", ErrCreateAborted, err.Error())
		} else if err != nil {
			return nil, fmt.Errorf("read the clock for the ttl: %w", err)
		}
		next.ExpireTime = next.CommitTime.Add(next.TTL)
	}
	value := snapshot.Encode(next, op)
	if err := checkRecordSize(value); err != nil {
		return nil, err
	}
	open := false // whether a commit without an answer may still take effect
	pauses := meta.Backoff{Rand: m.o.Jitter}
	for leases := 0; ; {
		done, err := m.tryCommit(ctx, c, next, value, lease, &open)
		switch {
		case done && err != nil:
			return nil, err
		case done:
			return next, nil
		case errors.Is(err, meta.ErrLeaseNotFound): // the lease of the result
			if leases++; leases < maxAttempts {
				continue
			}
			err = fmt.Errorf("%w: no lease for the result", ErrCreateAborted)
		case errors.Is(err, meta.ErrUnavailable) && pauses.Wait(ctx) == nil:
			continue
		}
		if open {
			return m.resolveCommit(ctx, c, next, err)
		}
		return nil, err
	}
}

// tryCommit sends the commit transaction and fills next from its result. It reports
// whether the outcome is final; err is then nil on success. It sets open when the
// outcome of a transaction is unknown.
func (m *Manager) tryCommit(
	ctx context.Context, c *creation, next *snapshot.Record, value []byte, lease *createLease, open *bool,
) (done bool, err error) {
	if err := lease.advance(ctx); err != nil && !*open {
		return true, err
	}
	var result request.Lease
	if c.tok.IsSet() {
		if result, err = m.o.Requests.Get(ctx); err != nil {
			return false, err
		}
	}
	generation := record.Encode(&storagev1.Generation{Format: record.Format, SnapshotId: next.ID})
	res, err := m.kv.Txn(ctx, meta.Txn{
		Name: "create.commit",
		If: []meta.Cond{
			meta.Unchanged(keys.Snapshot(next.ID), c.snap.Revision),
			meta.SameKey(keys.Pending(next.Collection, next.ID), c.snap.Revision),
		},
		Then: slices.Concat([]meta.Op{
			meta.Put(keys.Snapshot(next.ID), value),
			meta.Delete(keys.Pending(next.Collection, next.ID)),
			meta.Put(keys.Generation(next.Collection), generation),
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
	// A compare failed, and the record shows why: an earlier attempt was applied, or
	// the pending key is gone and no commit can take effect.
	now, err := m.reader.Record(ctx, next.ID)
	if err != nil {
		return false, err
	}
	if now != nil && now.State == snapshot.Pending {
		return true, fmt.Errorf("%w: its lease expired before the commit", ErrCreateAborted)
	}
	return true, fillCommitted(next, now, *open)
}

// fillCommitted fills next from now, its record, which is nil or no longer PENDING.
// open is whether the commit may have been applied.
func fillCommitted(next, now *snapshot.Record, open bool) error {
	switch {
	case now == nil && open:
		return fmt.Errorf("%w: %w: the commit got no answer, and the record is gone", errUndecided, meta.ErrUnavailable)
	case now == nil, now.State == snapshot.Deleting && now.CommitRevision == 0:
		return fmt.Errorf("%w: its lease expired before the commit", ErrCreateAborted)
	case now.State == snapshot.Deleting: // committed, and dropped since
		next.Revision, next.Order = now.CommitRevision, now.CommitRevision
	default: // by this create: no other commits this id
		*next = *now
	}
	return nil
}

// resolveCommit ends a create whose commit got no answer in time. It reports a failure
// only once the commit can no longer take effect.
func (m *Manager) resolveCommit(
	ctx context.Context, c *creation, next *snapshot.Record, cause error,
) (*snapshot.Record, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.o.LeaseTTL/3)
	defer cancel()
	_, why := terminalReason(cause)
	for pauses := (meta.Backoff{Rand: m.o.Jitter}); ; {
		now, err := m.reader.Record(ctx, next.ID)
		if err == nil {
			if now == nil || now.State != snapshot.Pending {
				return next, fillCommitted(next, now, true)
			}
			err = m.giveUp(ctx, now, "CREATE_ABORTED", fmt.Sprintf("the commit was prevented: %v", why), nil)
		}
		if err == nil {
			return nil, fmt.Errorf("the commit was prevented: %w", why)
		}
		if pauses.Wait(ctx) != nil {
			m.log.Warn("outcome of a commit still unknown", zap.Int64("snapshot", c.snap.ID), zap.Error(err))
			return nil, fmt.Errorf("%w: %w: %w", errUndecided, meta.ErrUnavailable, cause)
		}
	}
}

// errChanged means that a record changed after it was read.
var errChanged = errors.New("record changed")

// giveUp moves a PENDING snapshot to DELETING, which frees its name, and stores the
// error under its request token. fence is compared in the same transaction.
func (m *Manager) giveUp(ctx context.Context, s *snapshot.Record, reason, text string, fence []meta.Cond) error {
	for range maxAttempts {
		op, err := record.NewOp(m.o.Rand)
		if err != nil {
			return err
		}
		// Truncated: the size of a record is bounded.
		short := strings.ToValidUTF8(fmt.Sprintf("%.1024s", reason+": "+text), "?")
		txn := meta.Txn{
			Name: "create.giveup",
			If:   append([]meta.Cond{meta.Unchanged(keys.Snapshot(s.ID), s.Revision)}, fence...),
			Then: []meta.Op{
				meta.Put(keys.Snapshot(s.ID), snapshot.Encode(s.WithState(snapshot.Deleting, short), op)),
				meta.Delete(keys.SnapshotName(m.scope(s.Collection), s.Name)),
				meta.Delete(keys.Pending(s.Collection, s.ID)),
			},
		}
		var lease request.Lease
		if s.RequestKey != "" {
			if lease, err = m.completeToken(ctx, s.RequestKey, reason, text, &txn); err != nil {
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

// completeToken adds to txn the operations that store an error under the token at
// key. The lease is of the stored result. Without a token it does nothing.
func (m *Manager) completeToken(ctx context.Context, key, reason, text string, txn *meta.Txn) (request.Lease, error) {
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
