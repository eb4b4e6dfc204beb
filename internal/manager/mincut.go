package manager

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
)

// waitForCheckpoints waits until each checkpoint of the collection is at or after
// the wanted one. At the deadline of ctx it returns ErrCutNotReached.
func (m *Manager) waitForCheckpoints(ctx context.Context, ref catalog.Ref, want []catalog.Checkpoint) error {
	col, err := m.catalog.Collection(ctx, ref)
	if err != nil {
		return err
	}
	seen := map[int]bool{}
	for i, cp := range want {
		if cp.Shard < 0 || cp.Shard >= col.Shards() || seen[cp.Shard] {
			return &catalog.InvalidError{
				Field:   fmt.Sprintf("min_cut[%d].shard", i),
				Problem: fmt.Sprintf("%d is not a shard of %s, or occurs twice; it has 0 to %d", cp.Shard, &col, col.Shards()-1),
			}
		}
		seen[cp.Shard] = true
	}
	wait := ctx
	if deadline, ok := ctx.Deadline(); ok {
		// Ends before the deadline, so that the caller still receives the answer.
		left := time.Until(deadline)
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, left-min(left/5, 500*time.Millisecond))
		defer cancel()
	}
	waiting := m.checkpoints.await(col.ID) // joins before the checkpoints are read, so that no change is missed
	defer waiting.leave()
	for {
		view, err := m.catalog.At(ctx, col.ID, 0)
		if err != nil {
			return err
		}
		behind := laggingChannels(&view, want)
		if len(behind) == 0 {
			return nil
		}
		if view.Collection.State != catalog.Active {
			return view.Collection.CheckActive()
		}
		err = waiting.wait(wait)
		if wait.Err() != nil && (ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded)) {
			text := strings.Join(behind[:min(len(behind), maxNamed)], ", ")
			if more := len(behind) - maxNamed; more > 0 {
				text += fmt.Sprintf(", and %d more", more)
			}
			return fmt.Errorf("%w: %s; flush these channels, or ask for less", ErrCutNotReached, text)
		}
		if err != nil {
			return err
		}
	}
}

// laggingChannels describes the channels whose checkpoint is missing or before the
// wanted one.
func laggingChannels(v *catalog.View, want []catalog.Checkpoint) []string {
	var behind []string
	for _, w := range want {
		cp, ok := v.Checkpoints[w.Shard]
		switch {
		case !ok:
			behind = append(behind, fmt.Sprintf("shard %d (%q) has no checkpoint, wanted %d",
				w.Shard, v.Collection.Channel(w.Shard), w.Position.Timestamp))
		case cp.Position.Timestamp < w.Position.Timestamp:
			behind = append(behind, fmt.Sprintf("shard %d (%q) is at %d, wanted %d",
				w.Shard, v.Collection.Channel(w.Shard), cp.Position.Timestamp, w.Position.Timestamp))
		}
	}
	return behind
}
