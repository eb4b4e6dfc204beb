package cli

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

func (a *app) recoverCommand() *cobra.Command {
	var force, clock bool
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Unblocks a cluster after its metadata store was restored from a backup",
		Long: `Unblocks a cluster whose metadata store is older than its heartbeats in the object
store, as after etcd was restored from a backup. Until then nothing is allocated,
granted or deleted, because ids would be allocated twice.

It skips the ids that may have been allocated since the backup. Objects under such ids
are never deleted: their records were in the lost part of the metadata. It changes
nothing else, and nothing at all if the metadata store was not rolled back, so it can
be repeated.

A loss between two heartbeats, up to a minute, is not detected. After restoring etcd,
always use --force: it skips ids even if no rollback was detected.

With --clock it only declares the clocks of the servers and of the object store
correct, after one of them stepped or the cluster was down for longer than
clock_max_downtime. Until then, or until the clocks have been steady for a day,
nothing expires and nothing is collected.`,
		Example: "  snapshotctl recover --force\n  snapshotctl recover --clock",
		Args:    exactArgs(),
		RunE: a.run(func(ctx context.Context, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := unary(ctx, a, c.Collector.Recover, &snapshotdv1.RecoverRequest{Force: force, Clock: clock})
			if err != nil {
				return err
			}
			return a.print(resp, func(w io.Writer) {
				if clock {
					renderClockRecovery(w, resp)
				} else {
					renderRecovery(w, resp)
				}
			})
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "skip ids even if no rollback of the metadata store was detected")
	cmd.Flags().BoolVar(&clock, "clock", false, "only trust the clocks as they are now")
	cmd.MarkFlagsMutuallyExclusive("force", "clock")
	return cmd
}

func renderClockRecovery(w io.Writer, r *snapshotdv1.RecoverResponse) {
	now := r.GetClockTime().AsTime().Format(time.RFC3339)
	if r.GetClockWasStopped() {
		fprintf(w, "the clock is trusted again: %s\n", now)
		return
	}
	fprintf(w, "nothing to do: the clock is trusted: %s\n", now)
}

func renderRecovery(w io.Writer, r *snapshotdv1.RecoverResponse) {
	skipped := r.GetNextId() - r.GetSkippedFrom()
	switch {
	case r.GetWasBehind():
		fprintf(w, "the metadata store was behind and is unblocked; ")
	case skipped <= 0:
		fprintf(w, "nothing to do: the metadata store is not behind the object store\n")
		return
	}
	if skipped <= 0 {
		fprintf(w, "no ids skipped; the next is %d\n", r.GetNextId())
		return
	}
	fprintf(
		w, "skipped %s, from %d to %d; the next is %d\n", count(skipped, "id"), r.GetSkippedFrom(), r.GetNextId()-1,
		r.GetNextId(),
	)
}
