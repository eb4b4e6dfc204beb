package manager

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/snapshot"
)

// Collect runs a cycle of the collector now, see [collect.Collector.Collect]. It also
// reports snapshots that expired, were dropped or whose creator is gone. The leader
// removes them; Collect wakes the cleaner, which runs if this replica leads.
func (m *Manager) Collect(ctx context.Context, o collect.CycleOptions) (collect.Summary, error) {
	if err := m.CheckRollback(ctx); err != nil {
		return collect.Summary{}, fmt.Errorf("collect: %w", err)
	}
	collection := int64(0)
	if o.Collection != (catalog.Ref{}) {
		col, err := m.catalog.Collection(ctx, o.Collection)
		if err != nil {
			return collect.Summary{}, fmt.Errorf("collect: %w", err)
		}
		collection = col.ID
	}
	if err := m.view.sync(ctx); err != nil {
		return collect.Summary{}, fmt.Errorf("collect: %w", err)
	}
	deleting, dead, expiring, pinned := m.view.work()
	now, untrusted := m.clock.Judge(ctx)
	report := func(s *snapshot.Record, action collect.Action, reason string) error {
		if o.Report == nil || collection != 0 && s.Collection != collection {
			return nil
		}
		return o.Report(collect.Item{
			Kind: collect.ItemSnapshot, Action: action, Collection: s.Collection, ID: s.ID, Name: s.Name, Reason: reason,
		})
	}
	for _, s := range deleting {
		if err := report(s, collect.Deletes, "dropped; its own objects go, and then its record"); err != nil {
			return collect.Summary{}, err
		}
	}
	for _, s := range dead {
		if err := report(s, collect.Deletes, "its creator is gone; it was never committed"); err != nil {
			return collect.Summary{}, err
		}
	}
	for _, s := range slices.Concat(expiring, pinned) {
		if untrusted != nil || s.ExpireTime.After(now) {
			continue
		}
		action, reason := collect.Deletes, "expired at "+s.ExpireTime.UTC().Format(time.RFC3339)
		pins, _, err := m.Pins(ctx, s.ID, PinPlace{}, 1)
		if err != nil {
			return collect.Summary{}, fmt.Errorf("collect: %w", err)
		}
		if len(pins) > 0 {
			action, reason = collect.Keeps, reason+", but pinned by "+pins[0].Owner
		}
		if err := report(s, action, reason); err != nil {
			return collect.Summary{}, err
		}
	}
	if !o.DryRun {
		m.clean.Wake()
	}
	return m.collector.Collect(ctx, o)
}
