package copyjob

import (
	"context"
	"errors"
	"slices"
	"sync"

	"golang.org/x/time/rate"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// gate bounds how many objects a replica copies at once, over all jobs: those who
// wait are let in one by one, in the order in which they came. When the store
// does not keep up, the bound is halved; with each round of copies that go well
// it grows by one again.
type gate struct {
	mu      sync.Mutex
	limit   int // now
	most    int
	busy    int
	good    int             // copies that went well since the limit last changed
	waiting []chan struct{} // the first to come first; closed when it is let in
}

func newGate(most int) *gate { return &gate{limit: most, most: most} }

func (g *gate) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	turn := make(chan struct{})
	g.mu.Lock()
	g.waiting = append(g.waiting, turn)
	g.admit()
	g.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.waiting, turn); i >= 0 {
		g.waiting = slices.Delete(g.waiting, i, i+1)
	} else { // let in at the last moment
		g.busy--
		g.admit()
	}
	return ctx.Err()
}

// admit lets in who has room. The lock must be held.
func (g *gate) admit() {
	for g.busy < g.limit && len(g.waiting) > 0 {
		close(g.waiting[0])
		g.waiting = g.waiting[1:]
		g.busy++
	}
}

// leave ends what enter began; err is how the copy ended.
func (g *gate) leave(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy--
	switch {
	case errors.Is(err, object.ErrUnavailable):
		g.limit, g.good = max(1, g.limit/2), 0
	case err == nil && g.limit < g.most:
		if g.good++; g.good >= g.limit {
			g.limit, g.good = g.limit+1, 0
		}
	}
	g.admit()
}

// budget holds a job to its limits in this replica.
type budget struct {
	share           func() Limits
	requests, bytes meter
}

func newBudget(share func() Limits) *budget {
	return &budget{share: share, requests: newMeter(), bytes: newMeter()}
}

// spend waits until the job may make n requests that move bytes.
func (b *budget) spend(ctx context.Context, n int, bytes int64) error {
	if err := b.requests.take(ctx, int64(n), func() int64 { return b.share().Requests }); err != nil {
		return err
	}
	return b.bytes.take(ctx, bytes, func() int64 { return b.share().Bytes })
}

// meter is one of the limits. One waits for it at a time, for a quarter of a
// second or for one token, and then looks at the limit again; the others wait
// behind. So a limit that changes is heeded soon, however much is waited for.
type meter struct {
	turn    chan struct{} // size one; full while somebody waits
	limiter *rate.Limiter // of the one who waits
}

func newMeter() meter { return meter{turn: make(chan struct{}, 1), limiter: rate.NewLimiter(1, 1)} }

// take waits for n tokens of so many a second as limit says at each moment, 0 no
// limit.
func (m *meter) take(ctx context.Context, n int64, limit func() int64) error {
	if n == 0 || limit() == 0 {
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case m.turn <- struct{}{}:
	}
	defer func() { <-m.turn }()
	for n > 0 {
		perSecond := limit()
		if perSecond == 0 {
			break
		}
		burst := max(1, min(perSecond/4, 1<<30))
		if rate.Limit(perSecond) != m.limiter.Limit() {
			m.limiter.SetLimit(rate.Limit(perSecond))
			m.limiter.SetBurst(int(burst))
		}
		part := min(n, burst)
		if err := m.limiter.WaitN(ctx, int(part)); err != nil {
			return err
		}
		n -= part
	}
	return ctx.Err()
}
