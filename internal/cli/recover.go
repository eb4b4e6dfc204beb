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
		Short: "Lets a cluster go on whose metadata store was restored from a backup",
		Long: `Lets a cluster go on whose metadata store is older than what it wrote into the
object store, as after etcd was restored from a backup. Until then nothing is
allocated, granted or deleted, for ids would be handed out twice.

It skips the ids that may have been handed out since the backup. Objects under
such ids are left alone for ever: what they were is in the lost part of the
metadata. It changes nothing else, and nothing at all where the metadata store is
not behind, so that it can be repeated.

What etcd lost between two notes in the object store, up to a minute, goes
unnoticed. After you have restored etcd always run it with --force: then ids are
skipped whether or not anything was noticed.

With --clock it does none of that. It says that the clocks of the servers and of
the object store are right now, after one of them stepped or the cluster was down
for longer than clock_max_downtime. Until then, or until the clocks have been steady
for a day, nothing expires and nothing is collected.`,
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
	cmd.Flags().BoolVar(&force, "force", false, "skip ids also where nobody noticed that the metadata store is behind")
	cmd.Flags().BoolVar(&clock, "clock", false, "trust the clocks as they are now, and do nothing else")
	cmd.MarkFlagsMutuallyExclusive("force", "clock")
	return cmd
}

func renderClockRecovery(w io.Writer, r *snapshotdv1.RecoverResponse) {
	now := r.GetClockTime().AsTime().Format(time.RFC3339)
	if r.GetClockWasStopped() {
		fprintf(w, "the clock is trusted again: it is %s\n", now)
		return
	}
	fprintf(w, "nothing had to be done: the clock is trusted, it is %s\n", now)
}

func renderRecovery(w io.Writer, r *snapshotdv1.RecoverResponse) {
	skipped := r.GetNextId() - r.GetSkippedFrom()
	switch {
	case r.GetWasBehind():
		fprintf(w, "the metadata store was behind, and goes on; ")
	case skipped <= 0:
		fprintf(w, "nothing had to be done: the metadata store is not known to be behind the object store\n")
		return
	}
	if skipped <= 0 {
		fprintf(w, "no ids had to be skipped, the next is %d\n", r.GetNextId())
		return
	}
	fprintf(w, "skipped %s, from %d to %d; the next is %d\n", count(skipped, "id"), r.GetSkippedFrom(), r.GetNextId()-1, r.GetNextId())
}
