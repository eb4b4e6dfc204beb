package collect

import (
	"context"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// sweepDelay is the time between the begin of a term and its first sweep.
const sweepDelay = time.Minute

// Lead runs cycles and sweeps until ctx ends.
func (c *Collector) Lead(ctx context.Context, term election.Term) error {
	if c.o.Off {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.runCycles(ctx, term.Fence()) })
	group.Go(func() error { return c.runSweeps(ctx) })
	return group.Wait()
}

// runCycles runs cycles until ctx ends, and saves the result of each.
func (c *Collector) runCycles(ctx context.Context, fence meta.Cond) error {
	timer := time.NewTimer(c.o.Interval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		y, err := c.newCycle(ctx, CycleOptions{})
		if err != nil {
			return err
		}
		y.spillConds = []meta.Cond{fence}
		s, err := y.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = y.failed
		}
		c.problems.cycle.Note(err)
		if s.Error == "" {
			s.Error = c.gc.DeleteError()
		}
		c.last.Store(&s)
		if err := c.saveSummary(ctx, &s, fence); ctx.Err() == nil {
			c.problems.save.Note(err)
		}
		wait := c.o.Interval
		if y.more {
			wait = time.Millisecond
		}
		timer.Reset(wait)
	}
}

// saveSummary writes the record of the leader's last cycle.
func (c *Collector) saveSummary(ctx context.Context, s *Summary, fence meta.Cond) error {
	rec := encodeSummary(s)
	encodeHalts(rec, c.Halts(), c.replica)
	_, err := c.kv.Txn(ctx, meta.Txn{
		Name: "collect.note", If: []meta.Cond{fence}, Then: []meta.Op{meta.Put(keys.Cycle, record.Encode(rec))},
	})
	return err
}

// runSweeps sweeps at the configured interval until ctx ends. Errors are logged, and the
// next sweep retries.
func (c *Collector) runSweeps(ctx context.Context) error {
	timer := time.NewTimer(sweepDelay)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		summary, err := c.Sweep(ctx, SweepOptions{})
		if ctx.Err() != nil {
			return nil
		}
		stats := SweepStats{SweepSummary: summary, End: c.clock.Display()}
		if err != nil {
			stats.Error = err.Error()
		}
		c.problems.sweep.Note(err)
		if summary.Deleted+summary.Uploads > 0 {
			c.log.Info("sweep deleted objects without a record", zap.Int64("objects", summary.Deleted),
				zap.Int64("bytes", summary.Bytes), zap.Int64("uploads", summary.Uploads))
		}
		c.swept.mu.Lock()
		c.swept.stats = stats
		c.swept.mu.Unlock()
		timer.Reset(c.o.SweepInterval)
	}
}

// ReportHalts keeps the leader's list of halts current until ctx ends.
func (c *Collector) ReportHalts(ctx context.Context, fence meta.Cond) error {
	ticker := time.NewTicker(c.reportInterval)
	defer ticker.Stop()
	written, known := "", false // known: the record has written
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now := &storagev1.Round{}
		halts := c.Halts()
		encodeHalts(now, halts, c.replica)
		if known && haltsKey(now) == written {
			continue
		}
		err := c.saveHalts(ctx, fence, halts)
		if ctx.Err() != nil {
			return nil
		}
		c.problems.report.Note(err)
		if known = err == nil; known {
			written = haltsKey(now)
		}
	}
}

// saveHalts writes halts into the record, unless it has them.
func (c *Collector) saveHalts(ctx context.Context, fence meta.Cond, halts []Halt) error {
	kv, found, _, err := c.kv.Get(ctx, keys.Cycle)
	if err != nil {
		return err
	}
	rec, unchanged := &storagev1.Round{Format: record.Format}, meta.Absent(keys.Cycle)
	if found {
		if err := record.Decode(kv, rec); err != nil {
			return err
		}
		unchanged = meta.Unchanged(keys.Cycle, kv.ModRevision)
	}
	was := haltsKey(rec)
	encodeHalts(rec, halts, c.replica)
	if haltsKey(rec) == was {
		return nil
	}
	// A cycle that is saved meanwhile has the list as well.
	_, err = c.kv.Txn(ctx, meta.Txn{
		If:   []meta.Cond{fence, meta.Absent(keys.RolledBack), unchanged},
		Then: []meta.Op{meta.Put(keys.Cycle, record.Encode(rec))},
	})
	return err
}
