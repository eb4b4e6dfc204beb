package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

func (a *app) eventsCommand() *cobra.Command {
	var (
		follow bool
		req    snapshotdv1.WatchEventsRequest
	)
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Shows changes of collections, snapshots, pins, restores and tombstones",
		Long: `Shows changes of collections, snapshots, pins, restores and tombstones, one line per
event: revision, kind of change, type, id, state and name. With -o json it prints
one object per line, including bookmarks, each with the token that resumes after it.

Without -f it prints the events between --resume-token and now, and exits. With -f
it runs until interrupted, across restarts of the server. At the end it prints to
standard error how to resume.`,
		Example: `  snapshotctl events -f
  snapshotctl events -f --collection docs -o json
  snapshotctl events --resume-token AAAAAAAAAAE`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "run until interrupted")
	collection := addOptionalCollection(
		cmd, "only this `collection`, its snapshots, tombstones and restores, and all pins",
	)
	f.StringVar(&req.ResumeToken, "resume-token", "", "resume after the event with this `token` (default: from now on)")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		var err error
		if req.Collection, err = a.optionalRef(collection); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		token := req.GetResumeToken()
		show := func(m *snapshotdv1.WatchEventsResponse) error {
			token = m.GetResumeToken()
			return a.showEvent(m)
		}
		if follow {
			limited, cancel := a.withTimeout(ctx, 0)
			defer cancel()
			err = client.WatchEvents(limited, c.Events, &req, show)
			// An interruption or the requested timeout is the normal end.
			if limited.Err() != nil {
				err = nil
			}
		} else {
			err = a.pendingEvents(ctx, c, &req, show)
		}
		// The server would reject the token again.
		rejected := slices.Contains([]string{"INVALID_RESUME_TOKEN", "EVENTS_COMPACTED"}, client.Reason(err)) ||
			status.Code(err) == codes.InvalidArgument
		if a.output == formatTable && token != "" && !rejected {
			resume := shellQuote(token, "")
			if collection.text != "" { // a token is valid for the same filter only
				resume += " --collection " + shellQuote(collection.text, "")
			}
			fprintf(a.err, "to resume: snapshotctl events --resume-token %s\n", resume)
		}
		return err
	})
	return cmd
}

// errCaughtUp ends a watch that has shown every event up to now.
var errCaughtUp = errors.New("caught up")

// pendingEvents shows the events up to now.
func (a *app) pendingEvents(
	ctx context.Context, c *client.Client, req *snapshotdv1.WatchEventsRequest,
	show func(*snapshotdv1.WatchEventsResponse) error,
) error {
	ctx, cancel := a.withTimeout(ctx, callTimeout)
	defer cancel()
	// A stream without a token starts with a bookmark of the current revision.
	now := int64(0)
	if req.GetResumeToken() != "" {
		first := func(m *snapshotdv1.WatchEventsResponse) error {
			now = m.GetRevision()
			return errCaughtUp
		}
		err := client.WatchEvents(ctx, c.Events, &snapshotdv1.WatchEventsRequest{}, first)
		if !errors.Is(err, errCaughtUp) {
			return err
		}
	}
	err := client.WatchEvents(ctx, c.Events, req, func(m *snapshotdv1.WatchEventsResponse) error {
		if err := show(m); err != nil {
			return err
		}
		if m.GetBookmark() != nil && m.GetRevision() >= now {
			return errCaughtUp
		}
		return nil
	})
	if errors.Is(err, errCaughtUp) {
		return nil
	}
	return err
}

func (a *app) showEvent(m *snapshotdv1.WatchEventsResponse) error {
	if a.output != formatTable {
		return a.printLine(m)
	}
	line := eventLine(m)
	if line == "" {
		return nil
	}
	_, err := fmt.Fprintln(a.out, line)
	return err
}

// eventLine formats an event as one line; empty for a bookmark.
func eventLine(m *snapshotdv1.WatchEventsResponse) string {
	var (
		change     snapshotdv1.ChangeType
		thing      string
		id         int64
		state      string
		name, note string
	)
	switch e := m.GetEvent().(type) {
	case *snapshotdv1.WatchEventsResponse_Collection:
		c := e.Collection.GetCollection()
		change, thing, id, state = e.Collection.GetType(), "collection", c.GetId(), stateName(c.GetState())
		if c.GetName() != "" {
			name = fullName(c.GetDb(), c.GetName(), c.GetId())
		}
	case *snapshotdv1.WatchEventsResponse_Snapshot:
		s := e.Snapshot.GetSnapshot()
		change, thing, id, state = e.Snapshot.GetType(), "snapshot", s.GetId(), stateName(s.GetState())
		name, note = s.GetName(), s.GetReason()
		if s.GetCollection().GetId() != 0 {
			note = strings.TrimSuffix("of "+collectionName(s.GetCollection())+": "+note, ": ")
		}
	case *snapshotdv1.WatchEventsResponse_Pin:
		p := e.Pin.GetPin()
		change, thing, id, state = e.Pin.GetType(), "pin", p.GetId(), "-"
		if change == snapshotdv1.ChangeType_CHANGE_TYPE_DELETED {
			state = "REMOVED"
			if e.Pin.GetExpired() {
				state = "EXPIRED"
			}
		}
		name, note = p.GetOwner(), strings.TrimSuffix(
			fmt.Sprintf("on snapshot #%d: %s", p.GetSnapshotId(), p.GetReason()), ": ",
		)
	case *snapshotdv1.WatchEventsResponse_Restore:
		j := e.Restore.GetJob()
		change, thing, id, state = e.Restore.GetType(), "restore", j.GetId(), stateName(j.GetState())
		if t := j.GetTarget(); t.GetName() != "" {
			name = fullName(t.GetDb(), t.GetName(), t.GetId())
			note = strings.TrimSuffix(
				fmt.Sprintf("of snapshot %s, phase %s: %s", j.GetSnapshotName(), phase(j), j.GetReason()), ": ",
			)
		}
	case *snapshotdv1.WatchEventsResponse_Tombstone:
		t := e.Tombstone.GetTombstone()
		change, thing, id, state = e.Tombstone.GetType(), "tombstone", t.GetId(), "-"
		if t.GetCollectionId() != 0 {
			note = fmt.Sprintf("of collection #%d", t.GetCollectionId())
		}
		if kind := t.GetKind(); kind != snapshotdv1.Tombstone_KIND_UNSPECIFIED {
			note += ": " + enumName(kind, "KIND_")
		}
	default:
		return ""
	}
	if state == "UNSPECIFIED" { // deleted: the event has only the ids
		state = "-"
	}
	line := fmt.Sprintf(
		"%-10d  %-7s  %-10s  %-12d  %-9s  %s %s", m.GetRevision(), enumName(change, "CHANGE_TYPE_"), thing, id, state,
		cell(name), clean(note),
	)
	return strings.TrimRight(line, " ")
}
