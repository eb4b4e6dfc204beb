// Package request makes calls safe to repeat. A caller gives a token; the
// first transaction of the operation writes the token's record, with the id
// that the operation makes and no lease, so that it lasts as long as the
// operation; the one that ends the operation stores the result in it and puts
// it under a lease of a day. A repeat finds the record and joins or returns the
// result, though what it made may since be gone.
//
// The record holds besides when the day is over, by the reading that lifetimes are
// judged by: etcd begins leases again when it restarts or another of its members
// leads, so a lease alone may keep a record for ever. The leader removes what is
// over, see [Expired].
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

// Token is a caller's token with what it stands for. The zero Token is none:
// its methods then add nothing to a transaction.
type Token struct {
	Principal string // who calls
	Method    string // what is called
	Value     string // the caller's token; empty: none
	Hash      []byte // SHA-256 of the request without its token
}

// IsSet reports whether there is a token.
func (t Token) IsSet() bool { return t.Value != "" }

// Key is the key of the token's record; empty without a token.
func (t Token) Key() string {
	if !t.IsSet() {
		return ""
	}
	return keys.Request(t.Principal, t.Method, t.Value)
}

// Absent is the compare that nobody used the token yet.
func (t Token) Absent() []meta.Cond {
	if !t.IsSet() {
		return nil
	}
	return []meta.Cond{meta.Absent(t.Key())}
}

// Begin is the write of an operation's first transaction when others follow.
func (t Token) Begin(id int64) []meta.Op {
	if !t.IsSet() {
		return nil
	}
	return []meta.Op{meta.Put(t.Key(), record.Encode(&storagev1.Request{Format: record.Format, Hash: t.Hash, Id: id}))}
}

// End is the write of an operation that ends in its first transaction.
func (t Token) End(lease Lease, id int64, result []byte) []meta.Op {
	if !t.IsSet() {
		return nil
	}
	return []meta.Op{meta.PutLeased(t.Key(), record.Encode(&storagev1.Request{
		Format: record.Format, Hash: t.Hash, Id: id, Done: true, Result: result, ExpireTime: record.Nanos(lease.expires),
	}), lease.ID)}
}

// Complete is the write that ends an operation well when another than its first
// transaction does: kv is the token's record, which the transaction compares.
func Complete(kv meta.KeyValue, lease Lease, result []byte) (meta.Op, error) {
	rec := &storagev1.Request{}
	if err := record.Decode(kv, rec); err != nil {
		return meta.Op{}, err
	}
	rec.Done, rec.Result, rec.ExpireTime = true, result, record.Nanos(lease.expires)
	return meta.PutLeased(kv.Key, record.Encode(rec), lease.ID), nil
}

// Fail is Complete for an operation that ends with an error.
func Fail(kv meta.KeyValue, lease Lease, reason, text string) (meta.Op, error) {
	rec := &storagev1.Request{}
	if err := record.Decode(kv, rec); err != nil {
		return meta.Op{}, err
	}
	rec.Done, rec.ErrorReason, rec.ErrorText, rec.ExpireTime = true, reason, strings.ToValidUTF8(text, "?"), record.Nanos(lease.expires)
	return meta.PutLeased(kv.Key, record.Encode(rec), lease.ID), nil
}

// Expired says whether the record of a request that has ended is over. One that
// does not say when ends with its lease.
func Expired(kv meta.KeyValue, now time.Time) (bool, error) {
	rec := &storagev1.Request{}
	if err := record.Decode(kv, rec); err != nil {
		return false, err
	}
	return rec.GetDone() && rec.GetExpireTime() != 0 && !now.Before(record.Time(rec.GetExpireTime())), nil
}

// Record is what is known of a token.
type Record struct {
	ID          int64  // of what the operation makes
	Done        bool   // whether it has ended
	Result      []byte // when it ended well
	ErrorReason string // when it ended with an error
	ErrorText   string
	Revision    int64 // at which this was written
	Read        int64 // revision of the store when Find read it
	Hash        []byte
}

// Find returns the record of t, or nil when there is none. A record of another
// request is ErrReused.
func Find(ctx context.Context, kv meta.KV, t Token) (*Record, error) {
	if !t.IsSet() {
		return nil, nil //nolint:nilnil // no token, no record
	}
	got, found, now, err := kv.Get(ctx, t.Key())
	if err != nil {
		return nil, fmt.Errorf("read request token: %w", err)
	}
	if !found {
		return nil, nil //nolint:nilnil // not used yet
	}
	r, err := Decode(got)
	if err != nil {
		return nil, err
	}
	r.Read = now
	if !bytes.Equal(r.Hash, t.Hash) {
		return nil, fmt.Errorf("%w: make a new token for each request", ErrReused)
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

// How long a result is kept: at least the promised day. One lease serves all
// operations of a replica that end within leaseSpan.
const (
	keep      = 24 * time.Hour
	leaseSpan = time.Hour
)

// Lease is what a result is kept under.
type Lease struct {
	ID      meta.LeaseID
	expires time.Time // zero: when the lease ends
}

// Leases gives out the lease that results are kept under.
type Leases struct {
	kv      meta.KV
	now     func() time.Time
	stamp   func(ctx context.Context) (time.Time, error)
	turn    chan struct{} // holds one token; who has it may touch what follows
	lease   Lease
	granted time.Time
}

// NewLeases returns Leases on kv. The times at which records are over begin at
// stamp; with nil, or while it fails, they end with their lease alone.
func NewLeases(kv meta.KV, now func() time.Time, stamp func(ctx context.Context) (time.Time, error)) *Leases {
	l := &Leases{kv: kv, now: now, stamp: stamp, turn: make(chan struct{}, 1)}
	l.turn <- struct{}{}
	return l
}

// Get returns a lease with at least a day to go.
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
		return Lease{}, fmt.Errorf("lease for request tokens: %w", err)
	}
	l.lease, l.granted = Lease{ID: id}, now
	if l.stamp != nil {
		if began, err := l.stamp(ctx); err == nil { // else the lease decides
			l.lease.expires = began.Add(keep + leaseSpan)
		}
	}
	return l.lease, nil
}

// Forget drops a lease, after the store said that it is not there.
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
