// Package election elects one leader among replicas, with one key of a [meta.KV]: the
// replica that put it under a lease leads while this key exists.
//
// A candidate cycles through three states:
//
//	waiting  --key deleted-->  claiming  --txn succeeded-->  leading
//	   ^                           |                            |
//	   +---------- lost -----------+                            |
//	   +-- lead returned, key or lease lost, no proof for a TTL +
//
//	waiting   reads the key, and watches it until it is deleted
//	claiming  grants a lease; then one txn: key absent -> key = name under the
//	          lease, else get the key
//	leading   calls lead; renews the lease each third of its TTL; watches the key.
//	          At the end revokes the lease, which deletes the key
//
// The key's create revision is the term: it grows and never repeats. Only the store knows
// the leader for certain. A leader that is frozen, or whose clock stopped, may consider its
// term valid after another replica has begun the next one. Therefore each write of a leader
// must compare [Term.Fence]; the end of lead's context stops the work of a deposed leader,
// but protects nothing.
//
// Failures:
//
//	the claim: no reply          it is repeated: if the else branch finds the key under the
//	                             candidate's lease, the claim had succeeded. Late
//	                             transactions fail after the end of the lease
//	a renewal: no reply          it is retried; a TTL after the start of the last confirmed
//	                             renewal lead's context ends
//	the lease has ended          lead's context ends immediately
//	the key is deleted or        likewise, detected by the watch
//	replaced
//	the watch is lost            it is reopened
//	the replica is frozen        the lease ends, another replica is elected; after the
//	                             freeze fenced writes fail and lead's context ends
//	the store is lost            lead's context ends after a TTL; no replica leads until
//	                             the store is back
//	the store is full            lease grants are refused: the leader continues, but no
//	                             other replica is elected
//	lead does not return         other candidates are not blocked: the lease is no longer
//	                             renewed, and ends
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

// ErrLost is the cause of the end of lead's context if the term has ended, or can no longer
// be proved, while Run continues.
var ErrLost = errors.New("leadership lost")

// Options configure an [Election].
type Options struct {
	KV   meta.KV // required
	Key  string  // required; the same for all candidates
	Name string  // required; of this candidate, informative
	// TTL is how long a leader may be silent before it is replaced. Default 10 s, at
	// least 1 s.
	TTL  time.Duration
	Log  *zap.Logger    // default: none
	Rand func() float64 // in [0, 1), spreads retries; default [rand.Float64]
	// Problems receives repeated failures. Default: a new list.
	Problems *lasting.Problems
}

// Election is a candidate. Make one with [New].
type Election struct {
	o       Options
	failing *lasting.Problem
}

// Term is one term of a leader.
type Term struct {
	Key    string
	Create int64 // the revision of its start
	Name   string
}

// Fence holds during the term. Every write of a leader must compare it.
func (t Term) Fence() meta.Cond {
	return meta.SameKey(t.Key, t.Create)
}

// New returns a candidate, which is inactive until Run.
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
	if o.Problems == nil {
		o.Problems = lasting.New(time.Now)
	}
	o.Log = o.Log.With(zap.String("key", o.Key), zap.String("name", o.Name))
	return &Election{o, o.Problems.Add(o.Log, "election", "candidate or leader failed, retrying", "")}
}

// Run takes part in elections until ctx ends, and then returns nil. After each election it
// calls lead, with a context that ends with the term or with ctx, and waits for its return.
// Then it resigns, so that another replica is elected immediately, and takes part again
// after a pause. Errors of lead are logged.
//
// Calls of Run must not be concurrent.
func (e *Election) Run(ctx context.Context, lead func(ctx context.Context, term Term) error) error {
	backoff := meta.Backoff{Min: e.o.TTL / 100, Max: e.o.TTL / 2, Rand: e.o.Rand}
	// A leader that resigned lets other candidates claim the next term.
	pause := meta.Backoff{Min: e.o.TTL / 10, Max: e.o.TTL / 10, Rand: e.o.Rand}
	for ctx.Err() == nil {
		led, err := e.runOnce(ctx, lead)
		if ctx.Err() != nil {
			break
		}
		e.failing.Note(err, zap.Bool("led", led))
		switch { // the loop checks ctx
		case led:
			backoff.Reset()
			_ = pause.Wait(ctx)
		case err != nil:
			_ = backoff.Wait(ctx)
		default: // another candidate has won
			backoff.Reset()
		}
	}
	return nil //nolint:nilerr // the end of ctx is not an error
}

// runOnce waits until the key is absent and claims it. On success led is true, and lead was
// called and has returned.
func (e *Election) runOnce(ctx context.Context, lead func(context.Context, Term) error) (led bool, err error) {
	if err := e.wait(ctx); err != nil {
		return false, err
	}
	began := time.Now() // before the grant, so that the lease lasts at least as long in the store
	lease, err := e.o.KV.Grant(ctx, e.o.TTL)
	if err != nil {
		return false, err
	}
	defer func() { // also after a claim with an unknown result, which cannot succeed after that
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
	defer e.failing.Settle()()
	err = e.lead(ctx, term, lease, began, lead)
	e.o.Log.Info("leadership ended", zap.Int64("term", term.Create))
	return true, err
}

// wait waits until the key is absent.
func (e *Election) wait(ctx context.Context) error {
	for {
		_, found, revision, err := e.o.KV.Get(ctx, e.o.Key)
		if err != nil || !found {
			return err
		}
		stop := e.failing.Settle()
		err = e.watch(ctx, revision, func(ev meta.Event) bool { return ev.Deleted })
		stop()
		if err != nil {
			return err
		}
	}
}

// watch returns nil at the first event of the key after revision for which until returns
// true, or if it may have missed events.
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

// claim puts the key under lease if it is absent. After an error the result is unknown.
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
			holder := res.Ranges[0][0] // exists, since the compare failed
			return Term{e.o.Key, holder.CreateRevision, e.o.Name}, holder.Lease == lease, nil
		case !errors.Is(err, meta.ErrUnavailable):
			return Term{}, false, err
		}
		if backoff.Wait(ctx) != nil {
			return Term{}, false, err
		}
	}
}

// lead calls lead during the term. At began the lease had its full TTL.
func (e *Election) lead(
	ctx context.Context, term Term, lease meta.LeaseID, began time.Time, lead func(context.Context, Term) error,
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Ends the term even if the calls below hang.
	proof := time.AfterFunc(time.Until(began.Add(e.o.TTL)), func() {
		cancel(fmt.Errorf("%w: not renewed for %v", ErrLost, e.o.TTL))
	})
	defer proof.Stop()

	var work sync.WaitGroup
	work.Go(func() { e.renew(ctx, lease, began, proof, cancel) })
	work.Go(func() { e.watchKey(ctx, term, cancel) })
	err := lead(ctx, term)
	lost := context.Cause(ctx)
	cancel(nil)
	work.Wait()
	if errors.Is(lost, ErrLost) {
		return errors.Join(lost, err)
	}
	return err
}

// renew keeps the lease alive until ctx ends, and postpones proof after each renewal.
func (e *Election) renew(
	ctx context.Context, lease meta.LeaseID, began time.Time, proof *time.Timer, lose context.CancelCauseFunc,
) {
	interval := e.o.TTL / 3
	retry := meta.Backoff{Min: e.o.TTL / 100, Max: e.o.TTL / 10, Rand: e.o.Rand}
	timer := time.NewTimer(time.Until(began.Add(interval)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		start := time.Now()
		kctx, cancel := context.WithTimeout(ctx, interval) // leaves time for another attempt
		err := e.o.KV.KeepAlive(kctx, lease)
		cancel()
		switch {
		case err == nil:
			// If proof has fired meanwhile, the term has ended, regardless of the lease.
			if !proof.Stop() {
				return
			}
			proof.Reset(time.Until(start.Add(e.o.TTL)))
			retry.Reset()
			timer.Reset(time.Until(start.Add(interval)))
		case errors.Is(err, meta.ErrLeaseNotFound):
			lose(fmt.Errorf("%w: %w", ErrLost, err))
			return
		default:
			timer.Reset(retry.Next())
		}
	}
}

// watchKey ends the term when its key is deleted or replaced.
func (e *Election) watchKey(ctx context.Context, term Term, lose context.CancelCauseFunc) {
	backoff := meta.Backoff{Min: e.o.TTL / 100, Max: e.o.TTL / 10, Rand: e.o.Rand}
	after := term.Create
	for {
		err := e.watch(ctx, after, func(ev meta.Event) bool { return ev.Deleted || ev.KV.CreateRevision != term.Create })
		if err == nil {
			// Events may have been missed: read the key itself.
			kv, found, revision, err := e.o.KV.Get(ctx, term.Key)
			switch {
			case err != nil:
			case !found || kv.CreateRevision != term.Create:
				lose(fmt.Errorf("%w: the key was deleted", ErrLost))
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

// Leader returns the name of the leader, empty if there is none.
func Leader(ctx context.Context, kv meta.KV, key string) (string, error) {
	v, found, _, err := kv.Get(ctx, key)
	if err != nil || !found {
		return "", err
	}
	return string(v.Value), nil
}
