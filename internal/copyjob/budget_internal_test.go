package copyjob

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/virtual"
)

func TestLimiter(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		ctx := t.Context()
		g := newLimiter(8)
		enter := func() {
			t.Helper()
			if err := g.acquire(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for range 8 {
			enter()
		}
		waiting, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for range 4 { // who wait, and give up
			wg.Go(func() {
				if err := g.acquire(waiting); !errors.Is(err, context.Canceled) {
					t.Errorf("err = %v", err)
				}
			})
		}
		virtual.Wait()
		cancel()
		g.release(nil)
		wg.Wait()
		over, cancel := context.WithCancel(ctx)
		cancel()
		for range 20 {
			if err := g.acquire(over); !errors.Is(err, context.Canceled) {
				t.Errorf("err = %v", err)
			}
		}
		enter() // the place that is free, which nobody has lost

		for _, want := range []int{4, 2, 1, 1} { // halved
			g.release(object.ErrUnavailable)
			if g.limit != want {
				t.Errorf("limit %d, want %d", g.limit, want)
			}
		}
		for range 4 {
			g.release(object.ErrNotFound) // says nothing of the store
		}
		if g.limit != 1 || g.inUse != 0 {
			t.Errorf("limit %d, busy %d", g.limit, g.inUse)
		}
		rounds := 0
		for ; g.limit < 8; rounds++ {
			enter()
			g.release(nil)
		}
		if rounds != 1+2+3+4+5+6+7 {
			t.Errorf("it recovered after %d copies", rounds)
		}
		for range 100 {
			enter()
			g.release(nil)
		}
		if g.limit != 8 || g.inUse != 0 {
			t.Errorf("limit %d, busy %d", g.limit, g.inUse)
		}
	})
}

// TestBudget holds many to a limit together, and lets them go when it does.
func TestBudget(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		limits := Limits{Bytes: 1000}
		set := func(l Limits) {
			mu.Lock()
			defer mu.Unlock()
			limits = l
		}
		b := newBudget(func() Limits {
			mu.Lock()
			defer mu.Unlock()
			return limits
		})
		var spent int
		spender := func(ctx context.Context, bytes int64) {
			for b.spend(ctx, 1, bytes) == nil {
				mu.Lock()
				spent++
				mu.Unlock()
				time.Sleep(time.Millisecond)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { spender(ctx, 10) })
		}
		during := func(d time.Duration) int {
			mu.Lock()
			from := spent
			mu.Unlock()
			time.Sleep(d)
			virtual.Wait()
			mu.Lock()
			defer mu.Unlock()
			return spent - from
		}
		around := func(what string, got, want int) {
			t.Helper()
			if got < want*95/100 || got > want*105/100 {
				t.Errorf("%s: %d, want %d", what, got, want)
			}
		}
		during(time.Second)
		around("1000 bytes", during(10*time.Second), 1000)
		set(Limits{Bytes: 100})
		during(time.Second)
		around("100 bytes", during(30*time.Second), 300)
		set(Limits{Requests: 3})
		during(time.Second)
		around("3 requests", during(100*time.Second), 300)
		set(Limits{Requests: 50, Bytes: 100})
		during(time.Second)
		around("both", during(30*time.Second), 300)
		set(Limits{Requests: 1 << 40, Bytes: 1 << 50})
		if n := during(time.Second); n < 40_000 {
			t.Errorf("%d with high limits", n)
		}
		set(Limits{Bytes: 1})
		during(time.Minute)
		set(Limits{})
		during(time.Second + time.Millisecond) // for who waits for one byte
		if n := during(time.Second); n < 40_000 {
			t.Errorf("%d without limits", n)
		}
		cancel()
		wg.Wait()
		if err := b.spend(ctx, 1, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("err = %v", err)
		}
		// One file that is larger than all of it.
		set(Limits{Bytes: 10})
		began := time.Now()
		if err := b.spend(t.Context(), 1, 600); err != nil {
			t.Error(err)
		}
		if d := time.Since(began); d < 57*time.Second || d > 61*time.Second {
			t.Errorf("600 bytes at 10 a second took %v", d)
		}
	})
}

// slowSource reads manifests slowly, and counts.
type slowSource struct {
	mu    sync.Mutex
	reads int
	fail  error
}

func (s *slowSource) Metadata(context.Context, int64) (*manifest.Metadata, error) { return nil, nil }

func (s *slowSource) Manifest(ctx context.Context, _ int64, number int) ([]segment.Segment, error) {
	s.mu.Lock()
	s.reads++
	err := s.fail
	s.mu.Unlock()
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-timer.C:
	}
	return []segment.Segment{
		{ID: int64(2*number + 1), Builds: make([]segment.Build, 2)}, {ID: int64(2*number + 2), Builds: make([]segment.Build, 1)},
	}, err
}

// TestSources reads each manifest once for all who want it at a time, and does
// not take the interruption of one for that of another.
func TestManifestCache(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		src := &slowSource{}
		s := newManifestCache(src)
		md := &manifest.Metadata{}
		for n := range int64(6) {
			md.Manifests = append(md.Manifests, manifest.ManifestFile{FirstOrdinal: 2 * n, Segments: 2, FirstBuild: 3 * n, Builds: 3})
		}
		first, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.segments(first, 1, md, 1, 3); !errors.Is(err, context.Canceled) {
				t.Errorf("err = %v", err)
			}
		})
		virtual.Wait()
		for range 5 {
			wg.Go(func() {
				items, err := s.segments(t.Context(), 1, md, 1, 3)
				if err != nil || len(items) != 2 || items[0].ID != 2 || items[0].ordinal != 1 || items[0].firstBuild != 2 ||
					items[1].ID != 3 || items[1].ordinal != 2 || items[1].firstBuild != 3 {
					t.Errorf("%+v, err = %v", items, err)
				}
			})
		}
		virtual.Wait()
		cancel()
		wg.Wait()
		if src.reads != 3 { // the one that was interrupted, and both
			t.Errorf("%d reads", src.reads)
		}
		if items, err := s.segments(t.Context(), 1, md, 0, 12); err != nil || len(items) != 12 || items[11].firstBuild != 17 {
			t.Errorf("%+v, err = %v", items, err)
		}
		if n := len(s.entries); n != maxManifests {
			t.Errorf("%d manifests are kept", n)
		}
		if _, err := s.segments(t.Context(), 1, md, 10, 13); !errors.Is(err, errMapping) {
			t.Errorf("err = %v", err)
		}
		src.fail = object.ErrUnavailable
		before := src.reads
		for range 2 { // an error is not kept
			if _, err := s.segments(t.Context(), 2, md, 0, 2); !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("err = %v", err)
			}
		}
		if src.reads != before+2 {
			t.Errorf("%d reads", src.reads-before)
		}
		src.fail = nil
		md.Manifests[0].Builds = 4
		if _, err := s.segments(t.Context(), 3, md, 0, 2); !errors.Is(err, ErrSource) {
			t.Errorf("err = %v", err)
		}
	})
}
