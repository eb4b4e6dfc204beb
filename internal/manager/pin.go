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
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Bounds on pins. The API promises them.
const (
	maxPins      = 1000 // of one snapshot
	maxPinOwner  = 255  // bytes
	maxPinReason = 256  // bytes
	minPinTTL    = time.Second
	maxPinTTL    = 30 * 24 * time.Hour
)

const (
	pinsNamed  = 3   // how many pins an error names
	pinsAtOnce = 100 // how many are looked at or ended in one transaction
)

// readBackTimeout bounds what is done about a transaction without an answer, and
// about a lease that is not needed any more, after the caller may have gone.
const readBackTimeout = 5 * time.Second

// Pin keeps a snapshot from being dropped and from expiring. Without an answer
// from the store the error wraps meta.ErrUnavailable, and a call with the same
// token finds the pin if there is one.
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
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return nil, err
		}
		known, err := request.Find(ctx, m.kv, tok)
		if err != nil {
			return nil, err
		}
		var s *Snapshot
		if known == nil {
			if s, err = m.pinnable(ctx, ref); err != nil {
				known, err = m.wasFirst(ctx, tok, err)
			}
		}
		if known != nil {
			return pinOfToken(known)
		}
		if err != nil {
			return nil, err
		}
		ref.ID, p.Snapshot = s.ID, s.ID // a name is resolved once
		if p.ID == 0 {
			if p.ID, err = m.catalog.NextID(ctx); err != nil {
				return nil, err
			}
		}
		done, err := m.tryPin(ctx, tok, s, p)
		if err != nil {
			return nil, err
		}
		if done {
			m.log.Info("snapshot pinned", zap.Int64("snapshot", p.Snapshot), zap.Int64("pin", p.ID), zap.Duration("ttl", p.TTL))
			return p, nil
		}
	}
	return nil, catalog.ErrConflict
}

// pinnable returns a snapshot that may take another pin. The number of its pins
// is looked up, and not compared: a few more do no harm.
func (m *Manager) pinnable(ctx context.Context, ref Ref) (*Snapshot, error) {
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
		return nil, fmt.Errorf("%w: %s has %d pins, at most %d; remove some first", catalog.ErrLimitExceeded, s, res.Count, maxPins)
	}
	return s, nil
}

// tryPin is the transaction that pins s. It says false when s changed, the token
// was taken, or a lease was lost.
func (m *Manager) tryPin(ctx context.Context, tok request.Token, s *Snapshot, p *Pin) (bool, error) {
	var err error
	if p.op, err = record.NewOp(m.o.Rand); err != nil {
		return false, err
	}
	if p.CreateTime, err = m.leasePin(ctx, p); err != nil {
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
		m.revokePin(ctx, p.lease)
		return false, err
	}
	p.Revision = revision
	return true, nil
}

// leasePin grants the lease that p needs, and sets when it ends. The time is
// stamped before the lease begins, so that the pin does not end before it says.
func (m *Manager) leasePin(ctx context.Context, p *Pin) (now time.Time, err error) {
	p.lease, p.ExpireTime = 0, time.Time{}
	if p.TTL == 0 {
		return m.clock.Display(), nil
	}
	if now, err = m.clock.Stamp(ctx); err != nil {
		return now, fmt.Errorf("the time that the pin begins at: %w", err)
	}
	lease, err := m.kv.Grant(ctx, p.TTL)
	if err != nil {
		return now, fmt.Errorf("lease for the pin: %w", err)
	}
	p.lease, p.ExpireTime = lease, now.Add(p.TTL)
	return now, nil
}

// resolvePin finds out what became of a pin that got no answer. "There" is a
// verdict, for nobody else makes a pin of this id. "Not there" is none yet.
// Without a token nobody could find the pin, so its lease is revoked, after
// which it is not there for good. With one the lease stays: were the pin made
// just before it is revoked, the token would tell of a pin that does not keep
// anything. What is under a lease that nobody uses goes when it runs out.
func (m *Manager) resolvePin(ctx context.Context, tok request.Token, p *Pin, cause error) (bool, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBackTimeout)
	defer cancel()
	kv, found, _, err := m.kv.Get(ctx, keys.Pin(p.Snapshot, p.ID))
	if err == nil && found {
		p.Revision = kv.CreateRevision
		return true, nil
	}
	if !tok.IsSet() {
		m.revokePin(ctx, p.lease)
	}
	return false, cause
}

// revokePin ends a lease that is not needed any more. One that stays runs out by
// itself.
func (m *Manager) revokePin(ctx context.Context, lease meta.LeaseID) {
	if lease == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBackTimeout)
	defer cancel()
	if err := m.kv.Revoke(ctx, lease); err != nil {
		m.log.Warn("a pin's lease could not be revoked and runs out by itself", zap.Error(err))
	}
}

// tokenResult is what a token keeps of the pin that it made: the pin's key, which
// holds its ids, a zero, and its record.
func tokenResult(key string, value []byte) []byte {
	return slices.Concat([]byte(key), []byte{0}, value)
}

// pinOfToken returns the pin that a token made, as it was then.
func pinOfToken(known *request.Record) (*Pin, error) {
	key, value, _ := bytes.Cut(known.Result, []byte{0})
	return decodePin(meta.KeyValue{Key: string(key), Value: value, ModRevision: known.Revision})
}

// RenewPin makes a pin last from now on for ttl, or if that is 0 for as long as
// it did. Other errors than those of the store: ErrPinNotFound, ErrPinHasNoTTL.
// It may be repeated.
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
	gone := fmt.Errorf("%w: it was removed, or has ended; nothing has kept the snapshot since: pin it again", ErrPinNotFound)
	snapshot, err := m.pinned(ctx, ref, id)
	if err != nil {
		return nil, err
	}
	if snapshot == 0 {
		return nil, gone
	}
	key := keys.Pin(snapshot, id)
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return nil, err
		}
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
		if m.ended(ctx, old) {
			return nil, gone
		}
		if old.TTL == 0 {
			return nil, fmt.Errorf("%w: it lasts until it is removed, and needs no renewal", ErrPinHasNoTTL)
		}
		next := *old
		if ttl > 0 {
			next.TTL = ttl
		}
		done, err := m.tryRenew(ctx, old, &next)
		if err != nil {
			return nil, err
		}
		if done {
			m.revokePin(ctx, old.lease) // nothing is under it any more
			return &next, nil
		}
	}
	return nil, catalog.ErrConflict
}

// tryRenew is the transaction that renews a pin. It says false when the pin
// changed, or a lease was lost.
func (m *Manager) tryRenew(ctx context.Context, old, next *Pin) (bool, error) {
	var err error
	if next.op, err = record.NewOp(m.o.Rand); err != nil {
		return false, err
	}
	if _, err = m.leasePin(ctx, next); err != nil {
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
		return false, nil // it was stopped for longer than the pin is to last
	case err != nil && !meta.Refused(err):
		return m.resolveRenewal(ctx, next, err)
	case err != nil || !res.Succeeded:
		m.revokePin(ctx, next.lease)
		return false, err
	}
	next.Revision = res.Revision
	return true, nil
}

// resolveRenewal finds out what became of a renewal that got no answer. Unless
// it happened its lease is left to run out: were it revoked, a renewal that takes
// effect late would end the pin that the caller still has.
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

// Unpin removes a pin. That it does not exist, or the snapshot does not, is
// success. It may be repeated.
func (m *Manager) Unpin(ctx context.Context, ref Ref, id int64) error {
	if err := m.unpin(ctx, ref, id); err != nil {
		return fmt.Errorf("remove pin %d of snapshot %s: %w", id, ref, err)
	}
	return nil
}

func (m *Manager) unpin(ctx context.Context, ref Ref, id int64) error {
	snapshot, err := m.pinned(ctx, ref, id)
	if err != nil || snapshot == 0 {
		return err
	}
	key := keys.Pin(snapshot, id)
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return err
		}
		kv, found, _, err := m.kv.Get(ctx, key)
		if err != nil || !found {
			return err
		}
		p, unreadable := decodePin(kv)
		if unreadable == nil && p.Job != 0 {
			return fmt.Errorf("%w: it goes when job %d ends; cancel that instead", ErrPinOfRestore, p.Job)
		}
		if unreadable != nil { // the jobs know
			held, err := m.jobs.Holds(ctx, snapshot, id)
			if err != nil {
				return err
			}
			if held {
				return fmt.Errorf("%w: it goes when that ends; cancel it instead", ErrPinOfRestore)
			}
		}
		res, err := m.kv.Txn(ctx, meta.Txn{
			Name: "pin.remove",
			If:   []meta.Cond{meta.Unchanged(key, kv.ModRevision)},
			Then: []meta.Op{
				meta.Delete(key),
				meta.Put(keys.Unpin, record.Encode(&storagev1.Unpin{Format: record.Format, SnapshotId: snapshot, PinId: id})),
			},
		})
		if err != nil {
			return err
		}
		if res.Succeeded {
			m.revokePin(ctx, kv.Lease) // nothing is under it any more
			m.log.Info("pin removed", zap.Int64("snapshot", snapshot), zap.Int64("pin", id))
			return nil
		}
	}
	return catalog.ErrConflict
}

// pinned returns the id of the snapshot that a pin is said to be of, 0 when there
// is no such snapshot. One that is given by id alone is not looked at: a record
// that cannot be read does not hinder whoever has a pin on it.
func (m *Manager) pinned(ctx context.Context, ref Ref, pin int64) (int64, error) {
	if pin <= 0 {
		return 0, &catalog.InvalidError{Field: "pin_id", Problem: fmt.Sprintf("%d is no id: ids are positive", pin)}
	}
	if ref.ID > 0 && ref.Collection == (catalog.Ref{}) {
		return ref.ID, nil
	}
	s, err := m.Get(ctx, ref)
	switch {
	case errors.Is(err, ErrSnapshotNotFound), errors.Is(err, ErrExpiredOrDropped), errors.Is(err, ErrNeverExisted):
		return 0, nil
	case err != nil:
		return 0, err
	}
	return s.ID, nil
}

// Pins returns up to limit pins, of a snapshot or if that is 0 of all, in the
// order of snapshot id and pin id, from the first behind after on, and whether
// there are more. Of one whose record cannot be read it returns the ids.
func (m *Manager) Pins(ctx context.Context, snapshot int64, after PinPlace, limit int) (list []*Pin, more bool, err error) {
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
				m.log.Error("pin record is left alone", zap.String("key", kv.Key), zap.Error(err))
			}
			if p != nil && !m.ended(ctx, p) {
				list = append(list, p)
			}
		}
		if len(list) > 0 || !res.More {
			return list, res.More, nil
		}
		from = res.KVs[len(res.KVs)-1].Key + "\x00"
	}
}

// ended says whether a pin is over. Its lease may outlive it, for etcd begins leases
// again when it restarts and when another of its members leads. While the clock is
// not trusted the lease decides alone.
func (m *Manager) ended(ctx context.Context, p *Pin) bool {
	if p.ExpireTime.IsZero() || p.Job != 0 {
		return false
	}
	now, err := m.clock.Judge(ctx)
	return err == nil && !now.Before(p.ExpireTime)
}

// endPins removes pins that are over, in one transaction, as their leases would.
func (m *Manager) endPins(ctx context.Context, pins []*Pin, conds ...meta.Cond) error {
	for part := range slices.Chunk(pins, pinsAtOnce) {
		txn := meta.Txn{Name: "pin.remove", If: slices.Clone(conds)}
		for _, p := range part {
			key := keys.Pin(p.Snapshot, p.ID)
			txn.If = append(txn.If, meta.Unchanged(key, p.Revision))
			txn.Then = append(txn.Then, meta.Delete(key))
		}
		res, err := m.kv.Txn(ctx, txn)
		if err != nil {
			return fmt.Errorf("remove %d pins that are over: %w", len(part), err)
		}
		if !res.Succeeded { // one was renewed or removed: the next look shows
			continue
		}
		for _, p := range part {
			m.log.Info("pin ended", zap.Int64("snapshot", p.Snapshot), zap.Int64("pin", p.ID))
			m.revokePin(ctx, p.lease) // nothing is under it any more
		}
	}
	return nil
}

// pinNames tells people of the pins in a part of what keeps a snapshot. One that
// cannot be read is a pin like others.
func pinNames(kvs []meta.KeyValue, all int64) string {
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
	if more := all - int64(len(kvs)); more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(names, ", ")
}

// pinTTL returns a pin's ttl as it is kept, in whole seconds.
func pinTTL(ttl time.Duration) (time.Duration, error) {
	if ttl != 0 && (ttl < minPinTTL || ttl > maxPinTTL) {
		return 0, &catalog.InvalidError{
			Field:   "ttl",
			Problem: fmt.Sprintf("%v is not 1 second to 30 days; leave it out for a pin that lasts until it is removed", ttl),
		}
	}
	return (ttl + time.Second - 1).Truncate(time.Second), nil
}

func checkPinText(field, text string, least, most int) error {
	switch {
	case len(text) < least:
		return &catalog.InvalidError{Field: field, Problem: "is empty; say who pins the snapshot"}
	case len(text) > most:
		return &catalog.InvalidError{Field: field, Problem: fmt.Sprintf("%d bytes, at most %d", len(text), most)}
	case !utf8.ValidString(text):
		return &catalog.InvalidError{Field: field, Problem: "is not valid UTF-8"}
	}
	return nil
}
