package manager

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Bounds on pins, documented in the API.
const (
	maxPins      = 1000 // of one snapshot
	maxPinOwner  = 255  // bytes
	maxPinReason = 256  // bytes
	minPinTTL    = time.Second
	maxPinTTL    = 30 * 24 * time.Hour
)

const (
	pinsNamed  = 3   // pins named by an error
	pinsAtOnce = 100 // pins read or removed in one transaction
)

// readBackTimeout bounds the read after a transaction without an answer, and the
// revocation of an unused lease. Both continue when the caller's context ends.
const readBackTimeout = 5 * time.Second

// Pin protects a snapshot from drops and expiry. If the store does not answer, the error
// wraps meta.ErrUnavailable, and a call with the same token returns the pin if it was
// made.
func (m *Manager) Pin(ctx context.Context, tok request.Token, ref Ref, spec PinSpec) (*Pin, error) {
	p, err := m.pin(ctx, tok, ref, spec)
	if err != nil {
		return nil, fmt.Errorf("pin snapshot %s: %w", ref, err)
	}
	return p, nil
}

func (m *Manager) pin(ctx context.Context, tok request.Token, ref Ref, spec PinSpec) (*Pin, error) {
	if err := checkPinText("owner", spec.Owner, 1, maxPinOwner); err != nil {
		return nil, err
	}
	if err := checkPinText("reason", spec.Reason, 0, maxPinReason); err != nil {
		return nil, err
	}
	ttl, err := pinTTL(spec.TTL)
	if err != nil {
		return nil, err
	}
	p := &Pin{Owner: spec.Owner, Reason: spec.Reason, TTL: ttl}
	known, err := request.Do(ctx, m.kv, tok, func(ctx context.Context) (request.Commit, error) {
		s, err := m.checkPinnable(ctx, ref)
		if err != nil {
			return nil, err
		}
		ref.ID, p.Snapshot = s.ID, s.ID // the name is resolved once
		return func(ctx context.Context) (bool, error) {
			if p.ID == 0 {
				if p.ID, err = m.catalog.NextID(ctx); err != nil {
					return false, err
				}
			}
			return m.tryPin(ctx, tok, s, p)
		}, nil
	})
	switch {
	case err != nil:
		return nil, err
	case known != nil:
		return pinFromToken(known)
	}
	m.log.Info("snapshot pinned", zap.Int64("snapshot", p.Snapshot), zap.Int64("pin", p.ID), zap.Duration("ttl", p.TTL))
	return p, nil
}

// checkPinnable returns the snapshot of ref if it accepts another pin. The number of
// pins is read but not compared in the transaction: a small excess is harmless.
func (m *Manager) checkPinnable(ctx context.Context, ref Ref) (*snapshot.Record, error) {
	s, err := m.committed(ctx, ref)
	if err != nil {
		return nil, err
	}
	from, to := meta.Prefix(keys.PinPrefix(s.ID))
	res, err := m.kv.Range(ctx, meta.Range{From: from, To: to, KeysOnly: true, Limit: 1})
	if err != nil {
		return nil, fmt.Errorf("count the pins of %s: %w", s, err)
	}
	if res.Count >= maxPins {
		return nil, fmt.Errorf("%w: %s has %d pins, at most %d; remove some first",
			catalog.ErrLimitExceeded, s, res.Count, maxPins)
	}
	return s, nil
}

// tryPin sends the transaction that pins s. It returns false when s changed, the token
// was used, or a lease expired.
func (m *Manager) tryPin(ctx context.Context, tok request.Token, s *snapshot.Record, p *Pin) (bool, error) {
	var err error
	if p.op, err = record.NewOp(m.o.Rand); err != nil {
		return false, err
	}
	if p.CreateTime, err = m.grantPinLease(ctx, p); err != nil {
		return false, err
	}
	key, value := keys.Pin(p.Snapshot, p.ID), encodePin(p)
	won, revision, err := m.commitWith(ctx, tok, p.ID, tokenResult(key, value), meta.Txn{
		Name: "pin.create",
		If:   []meta.Cond{meta.Unchanged(keys.Snapshot(s.ID), s.Revision)},
		Then: []meta.Op{meta.PutLeased(key, value, p.lease)},
	})
	switch {
	case err != nil && !meta.Refused(err):
		return m.resolvePin(ctx, tok, p, err)
	case err != nil || !won:
		m.revokeLease(ctx, p.lease)
		return false, err
	}
	p.Revision = revision
	return true, nil
}

// grantPinLease grants the lease of p and sets its expire time, and returns the current
// time. The time is stamped before the grant, so that the lease does not end before the
// expire time.
func (m *Manager) grantPinLease(ctx context.Context, p *Pin) (now time.Time, err error) {
	p.lease, p.ExpireTime = 0, time.Time{}
	if p.TTL == 0 {
		return m.clock.Display(), nil
	}
	if now, err = m.clock.Stamp(ctx); err != nil {
		return now, fmt.Errorf("read the clock for the ttl of the pin: %w", err)
	}
	lease, err := m.kv.Grant(ctx, p.TTL)
	if err != nil {
		return now, fmt.Errorf("lease for the pin: %w", err)
	}
	p.lease, p.ExpireTime = lease, now.Add(p.TTL)
	return now, nil
}

// resolvePin determines the outcome of a pin without an answer. If the pin exists it was
// made, because no other call uses its id. If it does not exist, the transaction may
// still take effect. Without a token no caller can find the pin, so its lease is revoked;
// the pin then cannot exist. With a token the lease stays: if the pin were made just
// before the revocation, the token would return a pin that protects nothing. An unused
// lease expires, with its keys.
func (m *Manager) resolvePin(ctx context.Context, tok request.Token, p *Pin, cause error) (bool, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBackTimeout)
	defer cancel()
	kv, found, _, err := m.kv.Get(ctx, keys.Pin(p.Snapshot, p.ID))
	if err == nil && found {
		p.Revision = kv.CreateRevision
		return true, nil
	}
	if !tok.IsSet() {
		m.revokeLease(ctx, p.lease)
	}
	return false, cause
}

// revokeLease revokes a lease that is no longer needed. On an error it expires by itself.
func (m *Manager) revokeLease(ctx context.Context, lease meta.LeaseID) {
	if lease == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBackTimeout)
	defer cancel()
	if err := m.kv.Revoke(ctx, lease); err != nil {
		m.log.Warn("lease of a pin not revoked; it expires by itself", zap.Error(err))
	}
}

// tokenResult returns the result that a token stores for its pin: the pin's key, which
// holds its ids, a zero byte, and its record.
func tokenResult(key string, value []byte) []byte {
	return slices.Concat([]byte(key), []byte{0}, value)
}

// pinFromToken returns the pin that a token made, in its initial state.
func pinFromToken(known *request.Record) (*Pin, error) {
	key, value, _ := bytes.Cut(known.Result, []byte{0})
	return decodePin(meta.KeyValue{Key: string(key), Value: value, ModRevision: known.Revision})
}

// RenewPin extends a pin to ttl from now; 0 means its previous ttl. Errors other than
// the store's: ErrPinNotFound, ErrPinHasNoTTL. It may be repeated.
func (m *Manager) RenewPin(ctx context.Context, ref Ref, id int64, ttl time.Duration) (*Pin, error) {
	p, err := m.renewPin(ctx, ref, id, ttl)
	if err != nil {
		return nil, fmt.Errorf("renew pin %d of snapshot %s: %w", id, ref, err)
	}
	return p, nil
}

func (m *Manager) renewPin(ctx context.Context, ref Ref, id int64, ttl time.Duration) (*Pin, error) {
	ttl, err := pinTTL(ttl)
	if err != nil {
		return nil, err
	}
	gone := fmt.Errorf("%w: it was removed or has expired, and the snapshot was unprotected since; pin it again",
		ErrPinNotFound)
	snapshot, err := m.pinnedSnapshot(ctx, ref, id)
	if err != nil {
		return nil, err
	}
	if snapshot == 0 {
		return nil, gone
	}
	key := keys.Pin(snapshot, id)
	var renewed *Pin
	_, err = request.Do(ctx, m.kv, request.Token{}, func(ctx context.Context) (request.Commit, error) {
		kv, found, _, err := m.kv.Get(ctx, key)
		if err != nil {
			return nil, fmt.Errorf("read pin: %w", err)
		}
		if !found {
			return nil, gone
		}
		old, err := decodePin(kv)
		if err != nil {
			return nil, err
		}
		if m.pinExpired(ctx, old) {
			return nil, gone
		}
		if old.TTL == 0 {
			return nil, fmt.Errorf("%w: it lasts until it is removed, and needs no renewal", ErrPinHasNoTTL)
		}
		next := *old
		if ttl > 0 {
			next.TTL = ttl
		}
		return func(ctx context.Context) (bool, error) {
			done, err := m.tryRenew(ctx, old, &next)
			if err == nil && done {
				m.revokeLease(ctx, old.lease) // no key is under it
				renewed = &next
			}
			return done, err
		}, nil
	})
	return renewed, err
}

// tryRenew sends the transaction that renews a pin. It returns false when the pin
// changed or a lease expired.
func (m *Manager) tryRenew(ctx context.Context, old, next *Pin) (bool, error) {
	var err error
	if next.op, err = record.NewOp(m.o.Rand); err != nil {
		return false, err
	}
	if _, err = m.grantPinLease(ctx, next); err != nil {
		return false, err
	}
	key := keys.Pin(old.Snapshot, old.ID)
	res, err := m.kv.Txn(ctx, meta.Txn{
		Name: "pin.renew",
		If:   []meta.Cond{meta.Unchanged(key, old.Revision)},
		Then: []meta.Op{meta.PutLeased(key, encodePin(next), next.lease)},
	})
	switch {
	case errors.Is(err, meta.ErrLeaseNotFound):
		return false, nil // this process was stopped for longer than the new ttl
	case err != nil && !meta.Refused(err):
		return m.resolveRenewal(ctx, next, err)
	case err != nil || !res.Succeeded:
		m.revokeLease(ctx, next.lease)
		return false, err
	}
	next.Revision = res.Revision
	return true, nil
}

// resolveRenewal determines the outcome of a renewal without an answer. If it did not
// happen, its lease is left to expire: a revocation would end the pin if the renewal
// takes effect late.
func (m *Manager) resolveRenewal(ctx context.Context, next *Pin, cause error) (bool, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBackTimeout)
	defer cancel()
	kv, found, _, err := m.kv.Get(ctx, keys.Pin(next.Snapshot, next.ID))
	if err != nil || !found {
		return false, cause
	}
	if now, err := decodePin(kv); err != nil || now.op != next.op {
		return false, cause
	}
	next.Revision = kv.ModRevision
	return true, nil
}

// Unpin removes a pin. It succeeds if the pin or the snapshot does not exist. It may be
// repeated.
func (m *Manager) Unpin(ctx context.Context, ref Ref, id int64) error {
	if err := m.unpin(ctx, ref, id); err != nil {
		return fmt.Errorf("remove pin %d of snapshot %s: %w", id, ref, err)
	}
	return nil
}

func (m *Manager) unpin(ctx context.Context, ref Ref, id int64) error {
	snapshot, err := m.pinnedSnapshot(ctx, ref, id)
	if err != nil || snapshot == 0 {
		return err
	}
	key := keys.Pin(snapshot, id)
	_, err = request.Do(ctx, m.kv, request.Token{}, func(ctx context.Context) (request.Commit, error) {
		kv, found, _, err := m.kv.Get(ctx, key)
		if err != nil {
			return nil, err
		}
		if !found {
			return func(context.Context) (bool, error) { return true, nil }, nil
		}
		p, unreadable := decodePin(kv)
		if unreadable == nil && p.Job != 0 {
			return nil, fmt.Errorf("%w: it goes when job %d ends; cancel that instead", ErrPinOfRestore, p.Job)
		}
		if unreadable != nil { // the jobs show whether a restore owns it
			held, err := m.jobs.Holds(ctx, snapshot, id)
			if err != nil {
				return nil, err
			}
			if held {
				return nil, fmt.Errorf("%w: it goes when that ends; cancel it instead", ErrPinOfRestore)
			}
		}
		return func(ctx context.Context) (bool, error) {
			removed := record.Encode(&storagev1.Unpin{Format: record.Format, SnapshotId: snapshot, PinId: id})
			res, err := m.kv.Txn(ctx, meta.Txn{
				Name: "pin.remove",
				If:   []meta.Cond{meta.Unchanged(key, kv.ModRevision)},
				Then: []meta.Op{meta.Delete(key), meta.Put(keys.Unpin, removed)},
			})
			if err == nil && res.Succeeded {
				m.revokeLease(ctx, kv.Lease) // no key is under it
				m.log.Info("pin removed", zap.Int64("snapshot", snapshot), zap.Int64("pin", id))
			}
			return res.Succeeded, err
		}, nil
	})
	return err
}

// pinnedSnapshot returns the id of the snapshot of ref, 0 if it does not exist. A ref
// with only an id is not read: an unreadable record does not block changes of its pins.
func (m *Manager) pinnedSnapshot(ctx context.Context, ref Ref, pin int64) (int64, error) {
	if pin <= 0 {
		return 0, &catalog.InvalidError{Field: "pin_id", Problem: fmt.Sprintf("%d is no id: ids are positive", pin)}
	}
	if ref.ID > 0 && ref.Collection == (catalog.Ref{}) {
		return ref.ID, nil
	}
	s, err := m.Get(ctx, ref)
	switch {
	case errors.Is(err, ErrSnapshotNotFound), errors.Is(err, snapshot.ErrExpiredOrDropped),
		errors.Is(err, snapshot.ErrNeverExisted):
		return 0, nil
	case err != nil:
		return 0, err
	}
	return s.ID, nil
}

// Pins returns up to limit pins of a snapshot, or of all if snapshot is 0, that follow
// after in the order of snapshot id and pin id, and whether more exist. A pin with an
// unreadable record has only its ids.
func (m *Manager) Pins(
	ctx context.Context, snapshot int64, after PinPlace, limit int,
) (list []*Pin, more bool, err error) {
	from, to := meta.Prefix(keys.AllPinsPrefix)
	if snapshot > 0 {
		from, to = meta.Prefix(keys.PinPrefix(snapshot))
	}
	if after != (PinPlace{}) {
		from = keys.Pin(after.Snapshot, after.ID) + "\x00"
	}
	for {
		res, err := m.kv.Range(ctx, meta.Range{From: from, To: to, Limit: limit})
		if err != nil {
			return nil, false, fmt.Errorf("list pins: %w", err)
		}
		for _, kv := range res.KVs {
			p, err := decodePin(kv)
			if err != nil {
				m.log.Error("pin record ignored: it cannot be read", zap.String("key", kv.Key), zap.Error(err))
			}
			if p != nil && !m.pinExpired(ctx, p) {
				list = append(list, p)
			}
		}
		if len(list) > 0 || !res.More {
			return list, res.More, nil
		}
		from = res.KVs[len(res.KVs)-1].Key + "\x00"
	}
}

// pinExpired reports whether a pin has expired. Its lease may still exist, because etcd
// restarts the time of leases when it restarts or changes its leader. While the clock is
// not trusted, only the lease decides.
func (m *Manager) pinExpired(ctx context.Context, p *Pin) bool {
	if p.ExpireTime.IsZero() || p.Job != 0 {
		return false
	}
	now, err := m.clock.Judge(ctx)
	return err == nil && !now.Before(p.ExpireTime)
}

// removeExpiredPins removes pins in transactions of up to pinsAtOnce, and revokes their
// leases. Readers see them as expired.
func (m *Manager) removeExpiredPins(ctx context.Context, pins []*Pin, conds ...meta.Cond) error {
	for part := range slices.Chunk(pins, pinsAtOnce) {
		txn := meta.Txn{Name: "pin.remove", If: slices.Clone(conds)}
		for _, p := range part {
			key := keys.Pin(p.Snapshot, p.ID)
			txn.If = append(txn.If, meta.Unchanged(key, p.Revision))
			txn.Then = append(txn.Then, meta.Delete(key))
		}
		res, err := m.kv.Txn(ctx, txn)
		if err != nil {
			return fmt.Errorf("remove %d expired pins: %w", len(part), err)
		}
		if !res.Succeeded { // one was renewed or removed: the next pass reads them again
			continue
		}
		for _, p := range part {
			m.log.Info("pin expired", zap.Int64("snapshot", p.Snapshot), zap.Int64("pin", p.ID))
			m.revokeLease(ctx, p.lease) // no key is under it
		}
	}
	return nil
}

// describePins describes pins for an error. kvs are some of total pins; unreadable
// records are included.
func describePins(kvs []meta.KeyValue, total int64) string {
	var names []string
	for _, kv := range kvs {
		name := kv.Key[strings.LastIndexByte(kv.Key, '/')+1:]
		p, err := decodePin(kv)
		if p != nil {
			name = fmt.Sprint(p.ID)
		}
		if err != nil {
			names = append(names, name+" (its record cannot be read)")
			continue
		}
		name += " (" + p.Owner
		if p.Reason != "" {
			name += ": " + p.Reason
		}
		if !p.ExpireTime.IsZero() {
			name += " until " + p.ExpireTime.Format(time.RFC3339)
		}
		names = append(names, name+")")
	}
	if more := total - int64(len(kvs)); more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(names, ", ")
}

// pinTTL returns a pin's ttl rounded up to whole seconds, or an error if it is out of
// bounds.
func pinTTL(ttl time.Duration) (time.Duration, error) {
	if ttl != 0 && (ttl < minPinTTL || ttl > maxPinTTL) {
		return 0, &catalog.InvalidError{
			Field:   "ttl",
			Problem: fmt.Sprintf("%v is not 1 second to 30 days; omit it for a pin that lasts until it is removed", ttl),
		}
	}
	return (ttl + time.Second - 1).Truncate(time.Second), nil
}

// checkPinText checks that text is UTF-8 of minLen to maxLen bytes.
func checkPinText(field, text string, minLen, maxLen int) error {
	switch {
	case len(text) < minLen:
		return &catalog.InvalidError{Field: field, Problem: "is empty; name the owner of the pin"}
	case len(text) > maxLen:
		return &catalog.InvalidError{Field: field, Problem: fmt.Sprintf("%d bytes, at most %d", len(text), maxLen)}
	case !utf8.ValidString(text):
		return &catalog.InvalidError{Field: field, Problem: "is not valid UTF-8"}
	}
	return nil
}
