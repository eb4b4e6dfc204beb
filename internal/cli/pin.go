package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

func (a *app) pinCommand() *cobra.Command {
	cmd := group("pin", "Keeps snapshots from being dropped", `Keeps snapshots from being dropped and from expiring.

A user of a snapshot pins it, and renews or removes the pin. A pin with a ttl expires
by itself if its owner does not renew it; one without lasts until it is removed.
`+"`snapshotctl pin list SNAPSHOT`"+` lists the pins of a snapshot.`)
	cmd.Example = `  snapshotctl pin create nightly --owner backup-job --reason 'nightly export' --ttl 1h
  snapshotctl pin list nightly`
	cmd.AddCommand(a.pinCreate(), a.pinRenew(), a.pinRemove(), a.pinList())
	return cmd
}

var pinHeader = []string{"SNAPSHOT", "PIN", "OWNER", "REASON", "TTL", "CREATED", "EXPIRES"}

func pinCells(p *snapshotdv1.Pin) []any {
	ttl, expires := "-", "never"
	if p.GetTtl() != nil {
		ttl = p.GetTtl().AsDuration().String()
	}
	if p.GetExpireTime() != nil {
		expires = formatTime(p.GetExpireTime())
	}
	return []any{
		fmt.Sprintf("#%d", p.GetSnapshotId()), p.GetId(), p.GetOwner(), p.GetReason(), ttl, p.GetCreateTime(), expires,
	}
}

func renderPin(w io.Writer, p *snapshotdv1.Pin) {
	t := newTable(w, "", pinHeader...)
	t.row(pinCells(p)...)
	_ = t.flush() // w is memory
}

// maxPinTTL is the limit of the API.
const maxPinTTL = 30 * day

// parsePinTTL parses a pin's ttl; empty means none. The hint without explains omission.
func parsePinTTL(s, without string) (*durationpb.Duration, error) {
	if s == "" {
		return nil, nil //nolint:nilnil // none
	}
	d, err := parseTTL(s)
	if err != nil || d < time.Second || d > maxPinTTL {
		return nil, usageErrorf("--ttl %q: use a time span such as 10m or 7d, 1s to 30d; %s", s, without)
	}
	return durationpb.New(d), nil
}

// addPinArgs is addSnapshotArg for a command whose last argument is a pin id.
func addPinArgs(cmd *cobra.Command) *snapshotArg {
	c := addSnapshotArg(cmd)
	bySnapshot := cmd.Args
	cmd.Args = func(cmd *cobra.Command, argv []string) error {
		if !cmd.Flags().Changed("id") {
			return exactArgs("SNAPSHOT", "PIN_ID")(cmd, argv)
		}
		if err := exactArgs("PIN_ID")(cmd, argv); err != nil {
			return err
		}
		return bySnapshot(cmd, nil)
	}
	return c
}

// pinRef returns the snapshot and the pin of the arguments.
func (a *app) pinRef(c *snapshotArg, args []string) (*snapshotdv1.SnapshotRef, int64, error) {
	ref, err := a.snapshotRef(c, args)
	if err != nil {
		return nil, 0, err
	}
	id, err := parseID(args[len(args)-1])
	return ref, id, err
}

func (a *app) pinCreate() *cobra.Command {
	var owner, reason, ttl, token string
	cmd := &cobra.Command{
		Use:   "create SNAPSHOT --owner OWNER",
		Short: "Pins a snapshot",
		Long: `Pins a snapshot: until the pin is removed or expires, the snapshot is not dropped
and does not expire. With --ttl the pin expires unless it is renewed in time.
SNAPSHOT is a name, even if it consists of digits; an id is '#42' or --id 42.`,
		Example: `  snapshotctl pin create nightly --owner backup-job --reason 'nightly export' --ttl 1h
  snapshotctl pin create '#42' --owner audit --reason 'case 7'`,
	}
	arg := addSnapshotArg(cmd)
	f := cmd.Flags()
	f.StringVar(&owner, "owner", "", "the pin's owner, free `text` (required)")
	f.StringVar(&reason, "reason", "", "the reason, free `text`")
	f.StringVar(
		&ttl, "ttl", "",
		"expire the pin this time `span` after its creation or renewal, such as 10m or 7d, at most 30d (default: never)",
	)
	f.StringVar(&token, "request-token", "", "`token` of an earlier run of the same command, to get its pin")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.snapshotRef(arg, args)
		if err != nil {
			return err
		}
		if cmd.Flags().Changed("ttl") && ttl == "" {
			return usageErrorf(
				"--ttl is empty: use a time span such as 10m or 7d, or omit it for a pin that lasts until it is removed",
			)
		}
		if owner == "" {
			return usageErrorf("--owner is missing; it is shown to users who try to drop the snapshot")
		}
		req := &snapshotdv1.PinSnapshotRequest{Snapshot: ref, Owner: owner, Reason: reason, RequestToken: token}
		if req.Ttl, err = parsePinTTL(ttl, "omit it for a pin that lasts until it is removed"); err != nil {
			return err
		}
		if req.RequestToken == "" {
			req.RequestToken = client.NewRequestToken()
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.PinSnapshot, req)
		if client.Reason(err) == "LIMIT_EXCEEDED" {
			return &hintError{err, fmt.Sprintf("list its pins with `snapshotctl pin list %s` and remove those no longer needed",
				shellQuote(a.snapshot, ""))}
		}
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) {
			p := resp.GetPin()
			renderPin(w, p)
			which := fmt.Sprintf("'#%d' %d", p.GetSnapshotId(), p.GetId())
			if p.GetTtl() != nil {
				fprintf(w, "to renew: snapshotctl pin renew %s\n", which)
			}
			fprintf(w, "to undo: snapshotctl pin remove %s\n", which)
		})
	})
	return cmd
}

func (a *app) pinRenew() *cobra.Command {
	var ttl string
	cmd := &cobra.Command{
		Use:   "renew SNAPSHOT PIN_ID",
		Short: "Renews a pin",
		Long: `Restarts a pin's ttl from now, or sets a new ttl. An expired pin cannot be renewed:
nothing has kept the snapshot since.`,
		Example: `  snapshotctl pin renew nightly 65
  snapshotctl pin renew --id 42 65 --ttl 2h`,
	}
	arg := addPinArgs(cmd)
	cmd.Flags().StringVar(
		&ttl, "ttl", "", "the new ttl, a time `span` such as 10m or 7d, at most 30d (default: unchanged)",
	)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, id, err := a.pinRef(arg, args)
		if err != nil {
			return err
		}
		req := &snapshotdv1.RenewPinRequest{Snapshot: ref, PinId: id}
		if req.Ttl, err = parsePinTTL(ttl, "omit it to keep the ttl"); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.RenewPin, req)
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) { renderPin(w, resp.GetPin()) })
	})
	return cmd
}

func (a *app) pinRemove() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "remove SNAPSHOT PIN_ID",
		Aliases: []string{"delete", "unpin"},
		Short:   "Removes a pin",
		Long: `Removes a pin. Without pins the snapshot can be dropped, and is removed if it has
expired. Removing a pin that does not exist succeeds.`,
		Example: `  snapshotctl pin remove nightly 65
  snapshotctl pin remove '#42' 65`,
	}
	arg := addPinArgs(cmd)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, id, err := a.pinRef(arg, args)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.UnpinSnapshot, &snapshotdv1.UnpinSnapshotRequest{Snapshot: ref, PinId: id})
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) { fprintf(w, "removed pin %d of snapshot %s\n", id, clean(a.snapshot)) })
	})
	return cmd
}

func (a *app) pinList() *cobra.Command {
	limit := 0
	cmd := &cobra.Command{
		Use:   "list [SNAPSHOT]",
		Short: "Lists pins",
		Long:  "Lists the pins of one snapshot or of all, ordered by snapshot id and pin id.",
		Example: `  snapshotctl pin list
  snapshotctl pin list nightly -o json`,
	}
	arg := addSnapshotArg(cmd)
	one := cmd.Args
	cmd.Args = func(cmd *cobra.Command, argv []string) error {
		if len(argv) == 0 && !cmd.Flags().Changed("id") {
			if cmd.Flags().Changed("collection") {
				return asUsageError(cmd, errors.New("SNAPSHOT is missing: --collection alone does not select one"))
			}
			return nil
		}
		return one(cmd, argv)
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "list at most this `number` (default all)")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		req := &snapshotdv1.ListPinsRequest{}
		if len(args) > 0 || arg.id != 0 {
			var err error
			if req.Snapshot, err = a.snapshotRef(arg, args); err != nil {
				return err
			}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		l := a.list("pins", pinHeader...)
		err = pages(limit, func(size int32, token string) (int, string, error) {
			req.PageSize, req.PageToken = size, token
			resp, err := unary(ctx, a, c.Snapshots.ListPins, req)
			if err != nil {
				return 0, "", err
			}
			for _, p := range resp.GetPins() {
				if err := l.add(p, pinCells(p)...); err != nil {
					return 0, "", err
				}
			}
			return len(resp.GetPins()), resp.GetNextPageToken(), l.flush()
		})
		if err != nil {
			return err
		}
		return l.close()
	})
	return cmd
}
