package meta

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Method names a method of [KV] or [Watcher] to [Faulty].
type Method string

// The methods. Those of a [Watcher] count like those of the [KV] it came from.
const (
	MethodGet       Method = "Get"
	MethodRange     Method = "Range"
	MethodScan      Method = "Scan"
	MethodTxn       Method = "Txn"
	MethodWatch     Method = "Watch"
	MethodNext      Method = "Next"
	MethodProgress  Method = "Progress"
	MethodGrant     Method = "Grant"
	MethodKeepAlive Method = "KeepAlive"
	MethodRevoke    Method = "Revoke"
)

// Call is one call of a [Faulty].
type Call struct {
	N      int // number of earlier calls of all methods
	Method Method
}

// Fault is a fault that a [Faulty] injects into a [Call].
type Fault int

// The faults. A failed call returns an error that wraps [ErrUnavailable].
const (
	NoFault Fault = iota
	Before        // the call fails without effect
	After         // the call takes effect, and fails
)

// Faulty decorates a [KV] for tests: it fails calls before or after they took effect, or
// blocks them. It counts calls and faults, so that a test can assert that its fault fired. A
// failed Watch returns a failed watcher; a failed Next ends its watch, as in every [KV].
//
// All methods of Faulty are safe for concurrent use.
type Faulty struct {
	kv KV

	mu     sync.Mutex
	calls  int
	fired  int
	hook   func(Call) Fault
	frozen chan struct{} // closed by Thaw; nil when not frozen
}

var _ KV = (*Faulty)(nil)

// NewFaulty returns a Faulty over kv that only counts.
func NewFaulty(kv KV) *Faulty { return &Faulty{kv: kv} }

// Hook sets the function that chooses the fault of each later call, nil for none. Calls of
// fn may be concurrent.
func (f *Faulty) Hook(fn func(Call) Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = fn
}

// FailNth plans one fault for the call after the next n calls, counting only the given
// methods if any. It replaces earlier plans, and resets Fired.
func (f *Faulty) FailNth(n int, fault Fault, methods ...Method) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fired = 0
	var mu sync.Mutex
	f.hook = func(c Call) Fault {
		if len(methods) > 0 && !slices.Contains(methods, c.Method) {
			return NoFault
		}
		mu.Lock()
		defer mu.Unlock()
		n--
		if n == -1 {
			return fault
		}
		return NoFault
	}
}

// Calls returns the number of calls.
func (f *Faulty) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// Fired returns the number of injected faults since the last FailNth.
func (f *Faulty) Fired() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
}

// Freeze blocks every call, before its execution and before its return, until Thaw or the
// end of its context, like a stopped or disconnected process. Calls under way still take
// effect.
func (f *Faulty) Freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen == nil {
		f.frozen = make(chan struct{})
	}
}

// Thaw releases the calls that Freeze blocks.
func (f *Faulty) Thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen != nil {
		close(f.frozen)
		f.frozen = nil
	}
}

// waitThawed waits while f is frozen.
func (f *Faulty) waitThawed(ctx context.Context, m Method) error {
	for {
		f.mu.Lock()
		frozen := f.frozen
		f.mu.Unlock()
		if frozen == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s while frozen: %w", m, ctx.Err())
		case <-frozen:
		}
	}
}

// call is fail for a call that may block.
func (f *Faulty) call(ctx context.Context, m Method, do func() error) error {
	if err := f.waitThawed(ctx, m); err != nil {
		return err
	}
	return f.fail(m, func() error {
		if err := do(); err != nil {
			return err
		}
		return f.waitThawed(ctx, m)
	})
}

// fail counts a call of m and runs do, unless the fault is Before. The error of do takes
// precedence over that of the fault.
func (f *Faulty) fail(m Method, do func() error) error {
	f.mu.Lock()
	c, hook := Call{N: f.calls, Method: m}, f.hook
	f.calls++
	f.mu.Unlock()
	fault := NoFault
	if hook != nil {
		fault = hook(c)
	}
	if fault != NoFault {
		f.mu.Lock()
		f.fired++
		f.mu.Unlock()
	}
	if fault != Before {
		if err := do(); err != nil {
			return err
		}
	}
	if fault != NoFault {
		return fmt.Errorf("%s, call %d: %w: planned fault", m, c.N, ErrUnavailable)
	}
	return nil
}

// Get implements [KV].
func (f *Faulty) Get(ctx context.Context, key string) (kv KeyValue, found bool, revision int64, err error) {
	err = f.call(ctx, MethodGet, func() (err error) {
		kv, found, revision, err = f.kv.Get(ctx, key)
		return err
	})
	if err != nil {
		return KeyValue{}, false, 0, err
	}
	return kv, found, revision, nil
}

// Range implements [KV].
func (f *Faulty) Range(ctx context.Context, r Range) (res RangeResult, err error) {
	err = f.call(ctx, MethodRange, func() (err error) {
		res, err = f.kv.Range(ctx, r)
		return err
	})
	if err != nil {
		return RangeResult{}, err
	}
	return res, nil
}

// Scan implements [KV].
func (f *Faulty) Scan(ctx context.Context, from, to string, revision int64, fn func([]KeyValue) error) (rev int64,
	err error,
) {
	err = f.call(ctx, MethodScan, func() (err error) {
		rev, err = f.kv.Scan(ctx, from, to, revision, fn)
		return err
	})
	if err != nil {
		return 0, err
	}
	return rev, nil
}

// Txn implements [KV].
func (f *Faulty) Txn(ctx context.Context, t Txn) (res TxnResult, err error) {
	err = f.call(ctx, MethodTxn, func() (err error) {
		res, err = f.kv.Txn(ctx, t)
		return err
	})
	if err != nil {
		return TxnResult{}, err
	}
	return res, nil
}

// Grant implements [KV].
func (f *Faulty) Grant(ctx context.Context, ttl time.Duration) (id LeaseID, err error) {
	err = f.call(ctx, MethodGrant, func() (err error) {
		id, err = f.kv.Grant(ctx, ttl)
		return err
	})
	if err != nil {
		return 0, err
	}
	return id, nil
}

// KeepAlive implements [KV].
func (f *Faulty) KeepAlive(ctx context.Context, id LeaseID) error {
	return f.call(ctx, MethodKeepAlive, func() error { return f.kv.KeepAlive(ctx, id) })
}

// Revoke implements [KV].
func (f *Faulty) Revoke(ctx context.Context, id LeaseID) error {
	return f.call(ctx, MethodRevoke, func() error { return f.kv.Revoke(ctx, id) })
}

// Watch implements [KV]. It does not block when frozen; its Next does.
func (f *Faulty) Watch(ctx context.Context, from, to string, after int64) Watcher {
	w := &faultyWatcher{f: f, ctx: ctx}
	w.err = f.fail(MethodWatch, func() error {
		w.w = f.kv.Watch(ctx, from, to, after)
		return nil
	})
	return w
}

type faultyWatcher struct {
	f   *Faulty
	ctx context.Context //nolint:containedctx // of the watch; its end ends Next
	w   Watcher
	err error // final
}

func (w *faultyWatcher) Next() (b WatchBatch, err error) {
	if w.err != nil {
		return WatchBatch{}, w.err
	}
	w.err = w.f.call(w.ctx, MethodNext, func() (err error) {
		b, err = w.w.Next()
		return err
	})
	if w.err != nil {
		return WatchBatch{}, w.err
	}
	return b, nil
}

func (w *faultyWatcher) Progress(ctx context.Context) error {
	return w.f.call(ctx, MethodProgress, func() error {
		if w.w == nil {
			return fmt.Errorf("progress of a failed watch: %w", ErrUnavailable)
		}
		return w.w.Progress(ctx)
	})
}
