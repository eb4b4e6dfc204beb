// Package election elects one leader among replicas, with one key of a
// [meta.KV]: who put it, under a lease, leads for as long as that very key is
// there.
//
// A candidate goes round three states:
//
//	waiting  --the key is gone-->  claiming  --its txn won-->  leading
//	   ^                              |                           |
//	   +----------- lost -------------+                           |
//	   +--- lead returned, key or lease lost, no proof for a TTL -+
//
//	waiting   reads the key, and watches it until it is deleted
//	claiming  grants a lease; then one txn: key absent -> key = name under the
//	          lease, else get the key
//	leading   calls lead; renews the lease each third of its TTL; watches the key.
//	          At the end revokes the lease, which deletes the key
//
// The key's create revision is the term: it grows, and never comes back. Leading
// is known for sure only to the store. A leader that is stopped, or whose clock
// stands, may believe in its term after another has begun the next. So whatever
// it writes must compare [Term.Fence]; the context of lead ends the work of a
// leader that was deposed, but protects nothing.
//
// What can go wrong, and what follows:
//
//	the claim gets no answer     it is repeated: the key under our own lease, found
//	                             by the else branch, is a claim that had won. What
//	                             may still be on its way dies with the lease
//	a renewal gets no answer     it is tried again; after a TTL since the last one
//	                             that was confirmed was begun, lead's context ends
//	the lease is gone            lead's context ends at once
//	the key is gone or another   the same; the watch tells
//	the watch is lost            it is opened again
//	the replica is frozen        the lease ends, another is elected; when it goes
//	                             on its fenced writes are refused and its context
//	                             ends
//	the store is lost            lead's context ends after a TTL; nobody leads
//	                             until it is back
//	the store is full            lease grants are refused: who leads goes on, but
//	                             nobody is elected
//	lead does not return         no other candidate is held up: the lease is no
//	                             longer renewed, and ends
package election

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// ErrLost is the cause of the end of lead's context when the term is over, or
// can no longer be proved, while Run goes on.
var ErrLost = errors.New("leadership lost")

// Options configure an [Election].
type Options struct {
	KV   meta.KV // required
	Key  string  // required; the same for all candidates
	Name string  // required; of this candidate, for people who look
	// TTL is how long the others wait for a leader that is silent. Default 10 s,
	// at least 1 s.
	TTL  time.Duration
	Log  *zap.Logger    // default: none
	Rand func() float64 // in [0, 1), spreads retries; default [rand.Float64]
}

// Election is a candidate. Make one with [New].
type Election struct{ o Options }

// Term is one term of a leader.
type Term struct {
	Key    string
	Create int64 // the revision at which it began
	Name   string
}

// Fence holds for as long as the term does. Every write that only a leader may
// make compares it.
func (t Term) Fence() meta.Cond {
	return meta.SameKey(t.Key, t.Create)
}

// New returns a candidate that does nothing yet.
func New(o Options) *Election {
	if o.TTL <= 0 {
		o.TTL = 10 * time.Second
	}
	o.TTL = max(o.TTL, time.Second)
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Rand == nil {
		o.Rand = rand.Float64
	}
	o.Log = o.Log.With(zap.String("key", o.Key), zap.String("name", o.Name))
	return &Election{o}
}

// Run is a candidate until ctx ends, and then returns nil. Each time it is
// elected it calls lead, with a context that ends with the term or with ctx, and
// waits for it to return. Then it resigns, so that another is elected at once,
// and stands again after a pause. An error of lead is logged.
//
// Run must not be called twice at the same time.
func (e *Election) Run(ctx context.Context, lead func(ctx context.Context, term Term) error) error {
	backoff := meta.Backoff{Min: e.o.TTL / 100, Max: e.o.TTL / 2, Rand: e.o.Rand}
	// A leader that resigned leaves the next term to the others, if there are any.
	pause := meta.Backoff{Min: e.o.TTL / 10, Max: e.o.TTL / 10, Rand: e.o.Rand}
	failing := lasting.New(time.Now).Add(e.o.Log, "election", "a candidate or leader failed and stands again", "")
	for ctx.Err() == nil {
		led, err := e.stand(ctx, lead)
		if ctx.Err() != nil {
			break
		}
		failing.Note(err, zap.Bool("led", led))
		switch { // the loop looks at ctx
		case led:
			backoff.Reset()
			_ = pause.Wait(ctx)
		case err != nil:
			_ = backoff.Wait(ctx)
		default: // somebody else was faster, and is now waited for
			backoff.Reset()
		}
	}
	return nil //nolint:nilerr // that ctx ended says all
}

// stand waits for the key to be free and claims it; if that succeeds, led is
// true and lead has been called and has returned.
func (e *Election) stand(ctx context.Context, lead func(context.Context, Term) error) (led bool, err error) {
	if err := e.wait(ctx); err != nil {
		return false, err
	}
	began := time.Now() // before the grant, so that we never believe in a lease for longer than the store does
	lease, err := e.o.KV.Grant(ctx, e.o.TTL)
	if err != nil {
		return false, err
	}
	defer func() { // also of a claim whose outcome is unknown: it can win no more
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), e.o.TTL)
		defer cancel()
		rerr := e.o.KV.Revoke(rctx, lease)
		if rerr != nil {
			err = errors.Join(err, fmt.Errorf("resign: %w", rerr))
		}
	}()
	term, won, err := e.claim(ctx, lease, began.Add(e.o.TTL))
	if err != nil || !won {
		return false, err
	}
	e.o.Log.Info("elected", zap.Int64("term", term.Create))
	err = e.lead(ctx, term, lease, began, lead)
	e.o.Log.Info("term over", zap.Int64("term", term.Create))
	return true, err
}

// wait returns when the key is not there.
func (e *Election) wait(ctx context.Context) error {
	for {
		_, found, revision, err := e.o.KV.Get(ctx, e.o.Key)
		if err != nil || !found {
			return err
		}
		if err := e.watch(ctx, revision, func(ev meta.Event) bool { return ev.Deleted }); err != nil {
			return err
		}
	}
}

// watch returns nil at the first event of the key after revision for which until
// holds, or when events may have been missed.
func (e *Election) watch(ctx context.Context, revision int64, until func(meta.Event) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := e.o.KV.Watch(ctx, e.o.Key, e.o.Key+"\x00", revision)
	for {
		b, err := w.Next()
		if errors.Is(err, meta.ErrCompacted) || errors.Is(err, meta.ErrWatchBroken) {
			return nil
		}
		if err != nil {
			return err
		}
		if slices.ContainsFunc(b.Events, until) {
			return nil
		}
	}
}

// claim puts the key under lease if it is absent. An error means that it gave
// up with the outcome unknown.
func (e *Election) claim(ctx context.Context, lease meta.LeaseID, until time.Time) (term Term, won bool, err error) {
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	backoff := meta.Backoff{Min: e.o.TTL / 100, Max: e.o.TTL / 10, Rand: e.o.Rand}
	for {
		res, err := e.o.KV.Txn(ctx, meta.Txn{
			Name: "elect.claim",
			If:   []meta.Cond{meta.Absent(e.o.Key)},
			Then: []meta.Op{meta.PutLeased(e.o.Key, []byte(e.o.Name), lease)},
			Else: []meta.Op{meta.Get(e.o.Key)},
		})
		switch {
		case err == nil && res.Succeeded:
			return Term{e.o.Key, res.Revision, e.o.Name}, true, nil
		case err == nil:
			holder := res.Ranges[0][0] // there, or the compare had held
			return Term{e.o.Key, holder.CreateRevision, e.o.Name}, holder.Lease == lease, nil
		case !errors.Is(err, meta.ErrUnavailable):
			return Term{}, false, err
		}
		if backoff.Wait(ctx) != nil {
			return Term{}, false, err
		}
	}
}

// lead calls lead while the term lasts. The lease was last known to be alive for
// a TTL at began.
func (e *Election) lead(ctx context.Context, term Term, lease meta.LeaseID, began time.Time, lead func(context.Context, Term) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Ends the term whatever the calls below are doing, even when they hang.
	proof := time.AfterFunc(time.Until(began.Add(e.o.TTL)), func() { cancel(fmt.Errorf("%w: not renewed for %v", ErrLost, e.o.TTL)) })
	defer proof.Stop()

	var work sync.WaitGroup
	work.Go(func() { e.renew(ctx, lease, began, proof, cancel) })
	work.Go(func() { e.guard(ctx, term, cancel) })
	err := lead(ctx, term)
	lost := context.Cause(ctx)
	cancel(nil)
	work.Wait()
	if errors.Is(lost, ErrLost) {
		return errors.Join(lost, err)
	}
	return err
}

// renew keeps the lease alive until ctx ends, and moves proof on.
func (e *Election) renew(ctx context.Context, lease meta.LeaseID, began time.Time, proof *time.Timer, lose context.CancelCauseFunc) {
	every := e.o.TTL / 3
	retry := meta.Backoff{Min: e.o.TTL / 100, Max: e.o.TTL / 10, Rand: e.o.Rand}
	timer := time.NewTimer(time.Until(began.Add(every)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		start := time.Now()
		kctx, cancel := context.WithTimeout(ctx, every) // one that hangs must leave time for another
		err := e.o.KV.KeepAlive(kctx, lease)
		cancel()
		switch {
		case err == nil:
			// Stop tells whether the term has run out meanwhile: then it is over,
			// whatever the lease says.
			if !proof.Stop() {
				return
			}
			proof.Reset(time.Until(start.Add(e.o.TTL)))
			retry.Reset()
			timer.Reset(time.Until(start.Add(every)))
		case errors.Is(err, meta.ErrLeaseNotFound):
			lose(fmt.Errorf("%w: %w", ErrLost, err))
			return
		default:
			timer.Reset(retry.Next())
		}
	}
}

// guard ends the term when its key is no longer there.
func (e *Election) guard(ctx context.Context, term Term, lose context.CancelCauseFunc) {
	backoff := meta.Backoff{Min: e.o.TTL / 100, Max: e.o.TTL / 10, Rand: e.o.Rand}
	after := term.Create
	for {
		err := e.watch(ctx, after, func(ev meta.Event) bool { return ev.Deleted || ev.KV.CreateRevision != term.Create })
		if err == nil {
			// Or events were missed: in any case the key itself tells.
			kv, found, revision, err := e.o.KV.Get(ctx, term.Key)
			switch {
			case err != nil:
			case !found || kv.CreateRevision != term.Create:
				lose(fmt.Errorf("%w: the key is gone", ErrLost))
				return
			default:
				after = revision
			}
		}
		if backoff.Wait(ctx) != nil {
			return
		}
	}
}
