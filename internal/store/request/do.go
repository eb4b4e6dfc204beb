package request

import (
	"context"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// maxAttempts bounds the attempts of [Do].
const maxAttempts = 16

// Decide reads the preconditions of a call, and returns the commit that compares them.
type Decide func(ctx context.Context) (Commit, error)

// Commit executes a transaction. It is not done when a precondition changed, the token was
// used, or a lease was lost: nothing was written then.
type Commit func(ctx context.Context) (done bool, err error)

// Do executes a call with a request token: it decides and commits until a commit
// succeeds, and then returns nil. When an earlier or a concurrent call with the token
// succeeded, Do returns its record instead.
//
// An error of decide is returned after [Resolve], for a concurrent call with the token
// may have caused it; an error of a commit is returned as it is. After 16 attempts the
// error is [meta.ErrConflict]. Attempts are paced by [meta.Pause]; the zero Token is
// valid.
func Do(ctx context.Context, kv meta.KV, tok Token, decide Decide) (*Record, error) {
	return Loop{KV: kv, Pause: meta.Pause}.Do(ctx, tok, decide)
}

// Loop is [Do] with a pause of the caller.
type Loop struct {
	KV meta.KV
	// Pause waits before an attempt, which is at least 1, and returns ctx's error when ctx
	// ends.
	Pause func(ctx context.Context, attempt int) error
}

// Do is the function [Do] with l's pause.
func (l Loop) Do(ctx context.Context, tok Token, decide Decide) (*Record, error) {
	for attempt := range maxAttempts {
		err := ctx.Err()
		if attempt > 0 {
			err = l.Pause(ctx, attempt)
		}
		if err != nil {
			return nil, err
		}
		if known, err := Find(ctx, l.KV, tok); known != nil || err != nil {
			return known, err
		}
		commit, err := decide(ctx)
		if err != nil {
			return Resolve(ctx, l.KV, tok, err)
		}
		if done, err := commit(ctx); done || err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: gave up after %d attempts; nothing was written", meta.ErrConflict, maxAttempts)
}

// Resolve returns the record of a concurrent call with the token, whose success may have
// caused the error cause. Without such a record the error is cause. When the lookup fails,
// cause is no verdict, and the error is that of the lookup.
func Resolve(ctx context.Context, kv meta.KV, tok Token, cause error) (*Record, error) {
	known, err := Find(ctx, kv, tok)
	if err == nil && known == nil {
		err = cause
	}
	return known, err
}
