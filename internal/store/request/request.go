// Package request makes calls safe to repeat. A caller gives a token; the
// first transaction of the operation writes the token's record, with the id
// that the operation makes and without a lease, so that it lasts as long as the
// operation; the last transaction of the operation stores the result in it under
// a lease of a day. A repeat finds the record, and joins the operation or returns
// its result, even when the created thing is gone.
//
// The record also has its expire time, by the trusted reading of the clock: etcd
// renews leases when it restarts or changes its leader, so a lease alone may never
// end. The leader removes expired records, see [Expired].
//
// [Do] is the loop of a call: find the token, decide, compare, retry.
package request

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// ErrReused means that the token stands for another request.
var ErrReused = errors.New("request token was used for another request")

// Token is a caller's token and its request. The zero Token means none: its methods add
// nothing to a transaction.
type Token struct {
	Principal string // caller
	Method    string // called method
	Value     string // the token; empty: none
	Hash      []byte // SHA-256 of the request without its token
}

// IsSet reports whether there is a token.
func (t Token) IsSet() bool { return t.Value != "" }

// Key returns the key of the token's record; empty without a token.
func (t Token) Key() string {
	if !t.IsSet() {
		return ""
	}
	return keys.Request(t.Principal, t.Method, t.Value)
}

// Unused returns the compare that the token has no record.
func (t Token) Unused() []meta.Cond {
	if !t.IsSet() {
		return nil
	}
	return []meta.Cond{meta.Absent(t.Key())}
}

// Begin returns the write of an operation's first transaction of several.
func (t Token) Begin(id int64) []meta.Op {
	if !t.IsSet() {
		return nil
	}
	return []meta.Op{meta.Put(t.Key(), record.Encode(&storagev1.Request{Format: record.Format, Hash: t.Hash, Id: id}))}
}

// End returns the write of an operation with one transaction.
func (t Token) End(lease Lease, id int64, result []byte) []meta.Op {
	if !t.IsSet() {
		return nil
	}
	return []meta.Op{meta.PutLeased(t.Key(), record.Encode(&storagev1.Request{
		Format: record.Format, Hash: t.Hash, Id: id, Done: true, Result: result, ExpireTime: record.Nanos(lease.expires),
	}), lease.ID)}
}

// Complete returns the write of the last of several transactions, for success: kv is the
// token's record, which the transaction compares.
func Complete(kv meta.KeyValue, lease Lease, result []byte) (meta.Op, error) {
	rec := &storagev1.Request{}
	if err := record.Decode(kv, rec); err != nil {
		return meta.Op{}, err
	}
	rec.Done, rec.Result, rec.ExpireTime = true, result, record.Nanos(lease.expires)
	return meta.PutLeased(kv.Key, record.Encode(rec), lease.ID), nil
}

// Fail is Complete for an operation that failed.
func Fail(kv meta.KeyValue, lease Lease, reason, text string) (meta.Op, error) {
	rec := &storagev1.Request{}
	if err := record.Decode(kv, rec); err != nil {
		return meta.Op{}, err
	}
	rec.Done, rec.ErrorReason, rec.ErrorText = true, reason, strings.ToValidUTF8(text, "?")
	rec.ExpireTime = record.Nanos(lease.expires)
	return meta.PutLeased(kv.Key, record.Encode(rec), lease.ID), nil
}

// Expired reports whether the record of an ended request has expired. A record without an
// expire time ends with its lease.
func Expired(kv meta.KeyValue, now time.Time) (bool, error) {
	rec := &storagev1.Request{}
	if err := record.Decode(kv, rec); err != nil {
		return false, err
	}
	return rec.GetDone() && rec.GetExpireTime() != 0 && !now.Before(record.Time(rec.GetExpireTime())), nil
}

// Record is the record of a token.
type Record struct {
	ID          int64  // of the thing that the operation creates
	Done        bool   // the operation has ended
	Result      []byte // of a success
	ErrorReason string // of a failure
	ErrorText   string
	Revision    int64 // of the record
	Read        int64 // revision of the store when Find read it
	Hash        []byte
}

// Find returns the record of t, nil for none. A record of another request is ErrReused.
func Find(ctx context.Context, kv meta.KV, t Token) (*Record, error) {
	if !t.IsSet() {
		return nil, nil //nolint:nilnil // no token, no record
	}
	got, found, now, err := kv.Get(ctx, t.Key())
	if err != nil {
		return nil, fmt.Errorf("read request token: %w", err)
	}
	if !found {
		return nil, nil //nolint:nilnil // unused
	}
	r, err := Decode(got)
	if err != nil {
		return nil, err
	}
	r.Read = now
	if !bytes.Equal(r.Hash, t.Hash) {
		return nil, fmt.Errorf("%w: use a new token for each request", ErrReused)
	}
	return r, nil
}

// Decode reads a token's record.
func Decode(kv meta.KeyValue) (*Record, error) {
	rec := &storagev1.Request{}
	if err := record.Decode(kv, rec); err != nil {
		return nil, err
	}
	return &Record{
		ID: rec.GetId(), Done: rec.GetDone(), Result: rec.GetResult(),
		ErrorReason: rec.GetErrorReason(), ErrorText: rec.GetErrorText(),
		Revision: kv.ModRevision, Hash: rec.GetHash(),
	}, nil
}

// A result is kept for at least the promised day. One lease serves all operations of a
// replica that end within leaseSpan.
const (
	keep      = 24 * time.Hour
	leaseSpan = time.Hour
)

// Lease is the lease of a result.
type Lease struct {
	ID      meta.LeaseID
	expires time.Time // zero: the lease decides
}

// Leases grants the leases of results. It is safe for concurrent use.
type Leases struct {
	kv      meta.KV
	now     func() time.Time
	stamp   func(ctx context.Context) (time.Time, error)
	turn    chan struct{} // holds one token, which guards the fields below
	lease   Lease
	granted time.Time
}

// NewLeases returns Leases on kv. Records expire a day after stamp's time; with a nil or
// failing stamp they end with their lease only.
func NewLeases(kv meta.KV, now func() time.Time, stamp func(ctx context.Context) (time.Time, error)) *Leases {
	l := &Leases{kv: kv, now: now, stamp: stamp, turn: make(chan struct{}, 1)}
	l.turn <- struct{}{}
	return l
}

// Get returns a lease that lasts for at least a day.
func (l *Leases) Get(ctx context.Context) (Lease, error) {
	select {
	case <-ctx.Done():
		return Lease{}, ctx.Err()
	case <-l.turn:
	}
	defer func() { l.turn <- struct{}{} }()
	now := l.now()
	if age := now.Sub(l.granted); l.lease.ID != 0 && age >= 0 && age < leaseSpan {
		return l.lease, nil
	}
	id, err := l.kv.Grant(ctx, keep+leaseSpan)
	if err != nil {
		return Lease{}, fmt.Errorf("grant a lease for request tokens: %w", err)
	}
	l.lease, l.granted = Lease{ID: id}, now
	if l.stamp != nil {
		if began, err := l.stamp(ctx); err == nil { // else the lease decides
			l.lease.expires = began.Add(keep + leaseSpan)
		}
	}
	return l.lease, nil
}

// Forget drops a lease that the store does not have any more.
func (l *Leases) Forget(ctx context.Context, lease Lease) {
	select {
	case <-ctx.Done():
		return
	case <-l.turn:
	}
	defer func() { l.turn <- struct{}{} }()
	if l.lease.ID == lease.ID {
		l.lease = Lease{}
	}
}
