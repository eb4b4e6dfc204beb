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

Whoever needs a snapshot for a while pins it, and renews or removes the pin. A pin
with a ttl ends by itself when its owner is gone; one without lasts until it is
removed. What keeps a snapshot is in `+"`snapshotctl pin list SNAPSHOT`"+`.`)
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
	return []any{fmt.Sprintf("#%d", p.GetSnapshotId()), p.GetId(), p.GetOwner(), p.GetReason(), ttl, p.GetCreateTime(), expires}
}

func renderPin(w io.Writer, p *snapshotdv1.Pin) {
	t := newTable(w, "", pinHeader...)
	t.row(pinCells(p)...)
	_ = t.flush() // w is memory
}

// maxPinTTL is the longest that the API takes.
const maxPinTTL = 30 * day

// parsePinTTL reads a pin's ttl; empty is none.
func parsePinTTL(s, without string) (*durationpb.Duration, error) {
	if s == "" {
		return nil, nil //nolint:nilnil // none is given
	}
	d, err := parseTTL(s)
	if err != nil || d < time.Second || d > maxPinTTL {
		return nil, usageErrorf("--ttl %q: write a time span such as 10m or 7d, 1s to 30d; %s", s, without)
	}
	return durationpb.New(d), nil
}

// choosePin is choose for a command about a pin, whose id is the last argument.
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

// pinRef returns the snapshot and the pin that the user chose.
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
		Long: `Pins a snapshot: until the pin is removed or ends, the snapshot is not dropped
and does not expire. With --ttl the pin ends by itself unless it is renewed in
time. SNAPSHOT is a name, be it one of digits; an id is given as '#42' or with
--id 42.`,
		Example: `  snapshotctl pin create nightly --owner backup-job --reason 'nightly export' --ttl 1h
  snapshotctl pin create '#42' --owner audit --reason 'case 7'`,
	}
	arg := addSnapshotArg(cmd)
	f := cmd.Flags()
	f.StringVar(&owner, "owner", "", "who pins it, `text` for people (required)")
	f.StringVar(&reason, "reason", "", "what for, `text` for people")
	f.StringVar(&ttl, "ttl", "", "let the pin end so long after it was made or renewed: a time `span` such as 10m or 7d, at most 30d (default until it is removed)")
	f.StringVar(&token, "request-token", "", "`token` of an earlier run of the same command, to get the pin that it made")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.snapshotRef(arg, args)
		if err != nil {
			return err
		}
		if cmd.Flags().Changed("ttl") && ttl == "" {
			return usageErrorf("--ttl is empty: write a time span such as 10m or 7d, or leave it out for a pin that lasts until it is removed")
		}
		if owner == "" {
			return usageErrorf("--owner is missing: who keeps the snapshot? Others see it when they want to drop it")
		}
		req := &snapshotdv1.PinSnapshotRequest{Snapshot: ref, Owner: owner, Reason: reason, RequestToken: token}
		if req.Ttl, err = parsePinTTL(ttl, "leave it out for a pin that lasts until it is removed"); err != nil {
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
			return &hintError{err, fmt.Sprintf("see its pins with `snapshotctl pin list %s`, and remove those that nobody needs", shellQuote(a.snapshot, ""))}
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
		Short: "Makes a pin last its ttl from now",
		Long: `Makes a pin last its ttl from now, or a new one. A pin that has ended cannot be
renewed: nothing has kept the snapshot since.`,
		Example: `  snapshotctl pin renew nightly 65
  snapshotctl pin renew --id 42 65 --ttl 2h`,
	}
	arg := addPinArgs(cmd)
	cmd.Flags().StringVar(&ttl, "ttl", "", "the new ttl, a time `span` such as 10m or 7d, at most 30d (default as before)")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, id, err := a.pinRef(arg, args)
		if err != nil {
			return err
		}
		req := &snapshotdv1.RenewPinRequest{Snapshot: ref, PinId: id}
		if req.Ttl, err = parsePinTTL(ttl, "leave it out for as long as before"); err != nil {
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
		Long: `Removes a pin. When no other keeps it, the snapshot can be dropped, and goes if
its time has come. Removing a pin that does not exist is success.`,
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
		return a.print(resp, func(w io.Writer) { fprintf(w, "pin %d does not keep snapshot %s any more\n", id, clean(a.snapshot)) })
	})
	return cmd
}

func (a *app) pinList() *cobra.Command {
	limit := 0
	cmd := &cobra.Command{
		Use:   "list [SNAPSHOT]",
		Short: "Lists pins",
		Long:  "Lists the pins of a snapshot, or of all, in the order of snapshot id and pin id.",
		Example: `  snapshotctl pin list
  snapshotctl pin list nightly -o json`,
	}
	arg := addSnapshotArg(cmd)
	one := cmd.Args
	cmd.Args = func(cmd *cobra.Command, argv []string) error {
		if len(argv) == 0 && !cmd.Flags().Changed("id") {
			if cmd.Flags().Changed("collection") {
				return asUsageError(cmd, errors.New("SNAPSHOT is missing: --collection only says whose it is"))
			}
			return nil
		}
		return one(cmd, argv)
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "list so `many` (default all)")
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
