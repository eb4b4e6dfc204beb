package object

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"time"
)

// Op names a method of [Store].
type Op string

// The methods.
const (
	OpPut    Op = "put"
	OpCreate Op = "create"
	OpGet    Op = "get"
	OpHead   Op = "head"
	OpList   Op = "list"
	OpDelete Op = "delete"
	OpCopy   Op = "copy"
	OpAbort  Op = "abort uploads"
	OpOldest Op = "oldest upload"
	OpNow    Op = "now"
)

// Call is one call of a method.
type Call struct {
	Op Op
	// Keys is the key; the prefix of a list or an abort; all keys of a delete; the
	// source and the target of a copy; empty for Now.
	Keys []string
	N    int // number of earlier calls of any method
	NOp  int // number of earlier calls of the same method
}

// Fault is a fault that a [Faulty] injects into a call.
type Fault int

// The faults. Their errors wrap ErrUnavailable, unless stated otherwise.
const (
	// FaultNone passes the call through.
	FaultNone Fault = iota
	// FaultBefore fails the call before it reaches the store.
	FaultBefore
	// FaultFull fails the call before it reaches the store, with a [FullError].
	FaultFull
	// FaultDenied fails the call before it reaches the store, with a passing ErrDenied.
	FaultDenied
	// FaultMisconfigured fails the call before it reaches the store, with an
	// ErrMisconfigured that is not passing.
	FaultMisconfigured
	// FaultAfter executes the call and then loses the response. A list yields all its
	// objects and then fails.
	FaultAfter
	// FaultFlip inverts one bit in the middle of the body of a Get.
	FaultFlip
	// FaultTruncate ends the body of a Get halfway, without an error.
	FaultTruncate
)

// Faulty decorates a store for tests: it counts, delays, holds and fails calls as planned.
// Without a plan it changes nothing. The two corrupting faults affect only a Get with a
// body.
//
// It is safe for concurrent use. A list counts as called when its sequence is used.
type Faulty struct {
	store Store

	mu      sync.Mutex
	plan    func(Call) Fault
	calls   int
	byOp    map[Op]int
	fired   int
	latency time.Duration
	thawed  chan struct{} // closed unless frozen
}

var _ Store = (*Faulty)(nil)

// NewFaulty returns a decorator of s without a plan.
func NewFaulty(s Store) *Faulty {
	thawed := make(chan struct{})
	close(thawed)
	return &Faulty{store: s, byOp: make(map[Op]int), thawed: thawed}
}

// Plan sets the function that chooses the fault of each later call, nil for none, and resets
// the counts of calls and fired faults. Calls of plan do not overlap; plan must not use the
// Faulty.
func (f *Faulty) Plan(plan func(Call) Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.plan, f.calls, f.fired = plan, 0, 0
	clear(f.byOp)
}

// FailNth plans one fault for the call after n others, of op, or of any method if op is
// empty.
func (f *Faulty) FailNth(op Op, n int, fault Fault) {
	f.Plan(func(c Call) Fault {
		if (op == "" && c.N == n) || (op == c.Op && c.NOp == n) {
			return fault
		}
		return FaultNone
	})
}

// Calls returns the number of calls of op, or of any method if op is empty, since the last
// Plan.
func (f *Faulty) Calls(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if op == "" {
		return f.calls
	}
	return f.byOp[op]
}

// Fired returns the number of planned faults that took effect. Tests with a plan should
// check it.
func (f *Faulty) Fired() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
}

// SetLatency delays every later call by d before it reaches the store.
func (f *Faulty) SetLatency(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.latency = d
}

// Freeze holds every later call before it reaches the store, until Thaw or the end of its
// context.
func (f *Faulty) Freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.thawed:
		f.thawed = make(chan struct{})
	default: // already frozen
	}
}

// Thaw releases the calls that Freeze holds.
func (f *Faulty) Thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.thawed:
	default:
		close(f.thawed)
	}
}

// enter counts and delays a call, and returns its fault.
func (f *Faulty) enter(ctx context.Context, op Op, keys ...string) (Fault, error) {
	f.mu.Lock()
	call := Call{Op: op, Keys: keys, N: f.calls, NOp: f.byOp[op]}
	f.calls++
	f.byOp[op]++
	fault := FaultNone
	if f.plan != nil {
		fault = f.plan(call)
	}
	latency, thawed := f.latency, f.thawed
	f.mu.Unlock()

	if latency > 0 {
		timer := time.NewTimer(latency)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return FaultNone, ctx.Err()
		}
	}
	select {
	case <-thawed:
	case <-ctx.Done():
		return FaultNone, ctx.Err()
	}
	switch fault {
	case FaultBefore:
		return fault, f.fire(ErrUnavailable, op, "before", keys)
	case FaultDenied:
		return fault, f.fire(Passing(ErrDenied), op, "before", keys)
	case FaultMisconfigured:
		return fault, f.fire(ErrMisconfigured, op, "before", keys)
	case FaultFull:
		_ = f.fire(ErrUnavailable, op, "full", keys)
		return fault, fmt.Errorf("%s %v: %w", op, keys, &FullError{Place: "store of a test", Lacks: "no space left"})
	case FaultNone, FaultAfter, FaultFlip, FaultTruncate: // call applies these
	}
	return fault, nil
}

// fire counts a fault that took effect and returns its error.
func (f *Faulty) fire(kind error, op Op, when string, keys []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fired++
	return fmt.Errorf("%w: injected fault %s %s %v", kind, when, op, keys)
}

// call executes a call with the keys.
func call[T any](ctx context.Context, f *Faulty, op Op, do func() (T, error), keys ...string) (T, error) {
	var zero T
	fault, err := f.enter(ctx, op, keys...)
	if err != nil {
		return zero, err
	}
	v, err := do()
	if fault == FaultAfter {
		return zero, f.fire(ErrUnavailable, op, "after", keys)
	}
	return v, err
}

// Put implements [Store].
func (f *Faulty) Put(ctx context.Context, key string, body []byte) (Info, error) {
	return call(ctx, f, OpPut, func() (Info, error) { return f.store.Put(ctx, key, body) }, key)
}

// Create implements [Store].
func (f *Faulty) Create(ctx context.Context, key string, body []byte) (Info, error) {
	return call(ctx, f, OpCreate, func() (Info, error) { return f.store.Create(ctx, key, body) }, key)
}

// Head implements [Store].
func (f *Faulty) Head(ctx context.Context, key string) (Info, error) {
	return call(ctx, f, OpHead, func() (Info, error) { return f.store.Head(ctx, key) }, key)
}

// Now implements [Store].
func (f *Faulty) Now(ctx context.Context) (time.Time, error) {
	return call(ctx, f, OpNow, func() (time.Time, error) { return f.store.Now(ctx) })
}

// Copy implements [Store].
func (f *Faulty) Copy(ctx context.Context, r CopyRequest) (Info, error) {
	return call(ctx, f, OpCopy, func() (Info, error) { return f.store.Copy(ctx, r) }, r.From, r.To)
}

// AbortUploads implements [Store].
func (f *Faulty) AbortUploads(ctx context.Context, prefix string, before time.Time) (int, error) {
	return call(ctx, f, OpAbort, func() (int, error) { return f.store.AbortUploads(ctx, prefix, before) }, prefix)
}

// OldestUpload implements [Store].
func (f *Faulty) OldestUpload(ctx context.Context, prefix string) (time.Time, error) {
	return call(ctx, f, OpOldest, func() (time.Time, error) { return f.store.OldestUpload(ctx, prefix) }, prefix)
}

// Get implements [Store].
func (f *Faulty) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, Info, error) {
	fault, err := f.enter(ctx, OpGet, key)
	if err != nil {
		return nil, Info{}, err
	}
	r, info, err := f.store.Get(ctx, key, offset, length)
	switch {
	case fault == FaultAfter:
		if err == nil {
			_ = r.Close()
		}
		return nil, Info{}, f.fire(ErrUnavailable, OpGet, "after", []string{key})
	case err != nil || fault == FaultNone:
		return r, info, err
	}
	body, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return nil, Info{}, err
	}
	if len(body) > 0 {
		_ = f.fire(ErrUnavailable, OpGet, "in", []string{key})
		if fault == FaultFlip {
			body[len(body)/2] ^= 1
		} else {
			body = body[:len(body)/2]
		}
	}
	return io.NopCloser(bytes.NewReader(body)), info, nil
}

// List implements [Store].
func (f *Faulty) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		fault, err := f.enter(ctx, OpList, prefix)
		if err != nil {
			yield(Info{}, err)
			return
		}
		for info, err := range f.store.List(ctx, prefix) {
			if !yield(info, err) || err != nil {
				return
			}
		}
		if fault == FaultAfter {
			yield(Info{}, f.fire(ErrUnavailable, OpList, "after", []string{prefix}))
		}
	}
}

// Delete implements [Store]. A fault affects all its keys.
func (f *Faulty) Delete(ctx context.Context, keys ...string) error {
	fault, err := f.enter(ctx, OpDelete, keys...)
	if err == nil {
		err = f.store.Delete(ctx, keys...)
		if fault != FaultAfter {
			return err
		}
		err = f.fire(ErrUnavailable, OpDelete, "after", keys)
	}
	errs := make([]error, len(keys))
	for i, key := range keys {
		errs[i] = &DeleteError{Key: key, Err: err}
	}
	return Join(errs...)
}
