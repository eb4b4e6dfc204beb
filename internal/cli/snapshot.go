package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

func (a *app) snapshotCommand() *cobra.Command {
	cmd := group("snapshot", "Takes, shows and drops snapshots", `Takes, shows and drops snapshots.

A snapshot is a point-in-time capture of a collection. It holds no data itself: it
references files in place and keeps them from being deleted.`)
	cmd.Example = `  snapshotctl snapshot create nightly --collection docs
  snapshotctl snapshot describe nightly`
	cmd.AddCommand(
		a.snapshotCreate(), a.snapshotGet(), a.snapshotDescribe(), a.snapshotSegments(),
		a.snapshotList(), a.snapshotUpdate(), a.snapshotDrop(),
	)
	return cmd
}

// snapshotArg selects the snapshot of a command, by argument or flags.
type snapshotArg struct {
	id         int64
	collection *optionalCollection
}

// addSnapshotArg adds the argument and the flags to cmd that set the result.
func addSnapshotArg(cmd *cobra.Command) *snapshotArg {
	var c snapshotArg
	cmd.Flags().Int64Var(&c.id, "id", 0, "the snapshot's `id`, instead of SNAPSHOT")
	c.collection = addOptionalCollection(
		cmd, "the snapshot's `collection`: required if the name is ambiguous, otherwise checked",
	)
	cmd.Args = func(cmd *cobra.Command, argv []string) error {
		switch {
		case !cmd.Flags().Changed("id"):
			return exactArgs("SNAPSHOT")(cmd, argv)
		case len(argv) > 0:
			return asUsageError(cmd, fmt.Errorf("--id and %q exclude each other", clean(argv[0])))
		case c.id <= 0:
			return asUsageError(cmd, fmt.Errorf("--id %d: ids are positive numbers", c.id))
		}
		return nil
	}
	return &c
}

// snapshotRef returns the selected snapshot.
func (a *app) snapshotRef(c *snapshotArg, args []string) (*snapshotdv1.SnapshotRef, error) {
	a.snapshot = fmt.Sprintf("#%d", c.id)
	if c.id == 0 {
		a.snapshot = args[0]
	}
	ref, err := parseSnapshot(a.snapshot)
	if err != nil {
		return nil, err
	}
	if ref.Collection, err = a.optionalRef(c.collection); err != nil {
		return nil, err
	}
	return ref, nil
}

// collectionRef parses the name of a collection and keeps it for hints.
func (a *app) collectionRef(s string) (*snapshotdv1.CollectionRef, error) {
	a.collection = s
	return parseCollection(s)
}

// createFlags are the flags of snapshot create.
type createFlags struct {
	collection, description, ttl, expireTime, token string
	labels, minCut                                  []string
	exact, verify, noWait                           bool
}

func (c *createFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.collection, "collection", "", "`collection` to capture (required)")
	f.StringVar(&c.description, "description", "", "free `text`")
	f.StringArrayVar(&c.labels, "label", nil, "label `key=value`; may be repeated")
	f.StringVar(&c.ttl, "ttl", "",
		"expire this time `span` after the commit, such as 36h or 30d, at most 36525d (100 years)")
	f.StringVar(&c.expireTime, "expire-time", "", "expire at this `time` (RFC 3339)")
	f.StringArrayVar(&c.minCut, "min-cut", nil,
		"wait until a channel's checkpoint reaches this position, `shard=timestamp`; may be repeated")
	f.BoolVar(&c.exact, "require-exact", false, "fail if a segment has rows on both sides of the cut")
	f.BoolVar(&c.verify, "verify", false, "check every file in the object store, and fail if one is missing or altered")
	f.BoolVar(&c.noWait, "no-wait", false,
		"return when the snapshot is PENDING; with --min-cut, when the cut is reached")
	f.StringVar(&c.token, "request-token", "", "`token` of an earlier run of the same command, to join it")
	cmd.MarkFlagsMutuallyExclusive("ttl", "expire-time")
}

// createRequest builds the request from the flags.
func (a *app) createRequest(f *createFlags, name string) (*snapshotdv1.CreateSnapshotRequest, error) {
	if f.collection == "" {
		return nil, usageErrorf("--collection is missing")
	}
	a.snapshot = name
	req := &snapshotdv1.CreateSnapshotRequest{
		Name: name, Description: f.description,
		RequireExact: f.exact, Verify: f.verify, RequestToken: f.token,
	}
	var err error
	if req.Collection, err = a.collectionRef(f.collection); err != nil {
		return nil, err
	}
	if req.Labels, err = parseLabels(f.labels); err != nil {
		return nil, err
	}
	if req.MinCut, err = parsePositions(f.minCut); err != nil {
		return nil, err
	}
	switch {
	case f.ttl != "":
		d, err := parseTTL(f.ttl)
		if err != nil {
			return nil, err
		}
		req.Expiry = &snapshotdv1.CreateSnapshotRequest_Ttl{Ttl: durationpb.New(d)}
	case f.expireTime != "":
		t, err := parseTime(f.expireTime)
		if err != nil {
			return nil, err
		}
		req.Expiry = &snapshotdv1.CreateSnapshotRequest_ExpireTime{ExpireTime: t}
	}
	if f.noWait {
		req.Wait = new(bool)
	}
	if req.RequestToken == "" {
		req.RequestToken = client.NewRequestToken()
	}
	return req, nil
}

func (a *app) snapshotCreate() *cobra.Command {
	var f createFlags
	cmd := &cobra.Command{
		Use:   "create NAME --collection COLLECTION",
		Short: "Takes a snapshot of a collection",
		Long: `Takes a snapshot of a collection as of now. No file is copied or moved.

The server continues if snapshotctl stops waiting. To wait again, run the same command
with the printed --request-token; a token repeats exactly one request, for 24 hours.`,
		Example: `  snapshotctl snapshot create nightly --collection docs --ttl 30d
  snapshotctl snapshot create before-upgrade --collection prod/docs --label ticket=OPS-7 --verify
  snapshotctl snapshot create exact --collection '#7' --min-cut 0=4500,1=4500 --require-exact --timeout 1m`,
		Args: exactArgs("NAME"),
	}
	f.register(cmd)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		req, err := a.createRequest(&f, args[0])
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		limited, cancel := a.withTimeout(ctx, createTimeout)
		defer cancel()
		resp, err := c.Snapshots.CreateSnapshot(limited, req)
		if err != nil {
			if _, code := errorText(err); ctx.Err() != nil || code == codes.DeadlineExceeded {
				return &hintError{err, fmt.Sprintf(
					"the server continues; see `snapshotctl snapshot get %s`, or wait again by adding --request-token %s",
					shellQuote(args[0], ""), shellQuote(req.GetRequestToken(), ""),
				)}
			}
			return err
		}
		return a.print(resp, func(w io.Writer) { renderCreated(w, resp.GetSnapshot()) })
	})
	return cmd
}

func renderCreated(w io.Writer, s *snapshotdv1.Snapshot) {
	took := "-"
	if s.GetCommitTime() != nil {
		took = s.GetCommitTime().AsTime().Sub(s.GetCreateTime().AsTime()).Round(time.Millisecond).String()
	}
	t := newTable(w, "", "NAME", "ID", "STATE", "COLLECTION", "SEGMENTS", "ROWS", "FILES", "SIZE", "CUT", "TOOK")
	n := s.GetTotals()
	t.row(
		s.GetName(), s.GetId(), stateName(s.GetState()), collectionName(s.GetCollection()),
		n.GetSegments(), n.GetRows(), n.GetFiles(), size(n.GetBytes()), cut(s.GetCuts()), took,
	)
	_ = t.flush() // w is memory
	if s.GetState() == snapshotdv1.Snapshot_STATE_COMMITTED {
		fprintf(w, "manifest size: %s; data files stay in place\n", size(s.GetManifestBytes()))
	}
}

// cut formats the cuts of all channels in short form.
func cut(cs []*snapshotdv1.ChannelPosition) string {
	switch len(cs) {
	case 0:
		return "-"
	case 1:
		return dataTime(cs[0].GetPosition().GetTimestamp())
	case 2, 3, 4:
		var parts []string
		for _, c := range cs {
			parts = append(parts, fmt.Sprintf("%d=%s", c.GetShard(), dataTime(c.GetPosition().GetTimestamp())))
		}
		return strings.Join(parts, ",")
	}
	first, last := cs[0].GetPosition().GetTimestamp(), cs[0].GetPosition().GetTimestamp()
	for _, c := range cs {
		first = min(first, c.GetPosition().GetTimestamp())
		last = max(last, c.GetPosition().GetTimestamp())
	}
	return fmt.Sprintf("%s..%s (%d channels)", dataTime(first), dataTime(last), len(cs))
}

// collectionName returns the full name of a collection.
func collectionName(c *snapshotdv1.CollectionInfo) string {
	return fullName(c.GetDb(), c.GetName(), c.GetId())
}

// fullName returns a collection in the form that commands accept.
func fullName(db, name string, id int64) string {
	if name == "" {
		return fmt.Sprintf("#%d", id)
	}
	return db + "/" + name
}

var snapshotHeader = []string{
	"NAME", "ID", "STATE", "COLLECTION", "SEGMENTS", "ROWS", "FILES", "SIZE", "CREATED", "EXPIRES", "LABELS",
}

func snapshotCells(s *snapshotdv1.Snapshot) []any {
	n := s.GetTotals()
	expires := "never"
	if s.GetExpireTime() != nil {
		expires = formatTime(s.GetExpireTime())
	}
	return []any{
		s.GetName(), s.GetId(), stateName(s.GetState()), collectionName(s.GetCollection()),
		n.GetSegments(), n.GetRows(), n.GetFiles(), size(n.GetBytes()), s.GetCreateTime(), expires, formatMap(s.GetLabels()),
	}
}

func renderSnapshot(w io.Writer, s *snapshotdv1.Snapshot) {
	t := newTable(w, "", snapshotHeader...)
	t.row(snapshotCells(s)...)
	_ = t.flush() // w is memory
	if s.GetReason() != "" {
		fprintf(w, "reason: %s\n", clean(s.GetReason()))
	}
}

func (a *app) snapshotGet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get SNAPSHOT",
		Short: "Shows a snapshot's record",
		Long: `Shows a snapshot's record. SNAPSHOT is a name, even if it consists of digits; an id
is '#42' or --id 42.`,
		Example: `  snapshotctl snapshot get nightly
  snapshotctl snapshot get --id 42 -o json`,
	}
	arg := addSnapshotArg(cmd)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.snapshotRef(arg, args)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.GetSnapshot, &snapshotdv1.GetSnapshotRequest{Snapshot: ref})
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) { renderSnapshot(w, resp.GetSnapshot()) })
	})
	return cmd
}

// maxPage is the server's maximum page size.
const maxPage = 1000

// pages calls fetch for each page, up to the last page or to limit items; limit 0
// means all.
func pages(limit int, fetch func(size int32, token string) (n int, next string, err error)) error {
	if limit < 0 {
		return usageErrorf("--limit must not be negative")
	}
	token := ""
	for left := limit; ; {
		size := maxPage
		if limit > 0 {
			size = min(size, left)
		}
		n, next, err := fetch(int32(size), token)
		if err != nil {
			return err
		}
		left -= n
		if next == "" || limit > 0 && left <= 0 {
			return nil
		}
		token = next
	}
}

func (a *app) snapshotList() *cobra.Command {
	var (
		req            snapshotdv1.ListSnapshotsRequest
		labels, states []string
		limit          int
	)
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Lists snapshots, newest first",
		Long: `Lists snapshots, newest first, that match all filters and any of the states. Select
snapshots of a dropped collection by its id.`,
		Example: `  snapshotctl snapshot list
  snapshotctl snapshot list --collection docs --label ticket=OPS-7
  snapshotctl snapshot list --collection '#7' --state pending,committed,deleting --limit 10`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	collection := addOptionalCollection(cmd, "only of this `collection`")
	f.StringVar(&req.Db, "db", "", "only of collections in this `database`")
	f.Int64Var(&req.PartitionId, "partition", 0, "only those that include the partition with this `id`")
	f.StringArrayVar(&labels, "label", nil, "only those with this label `key=value`; may be repeated")
	f.StringSliceVar(&states, "state", nil, "only in these `states`: pending, committed, deleting (default committed)")
	f.StringVar(&req.NamePrefix, "prefix", "", "only those whose name begins with this `text`")
	f.IntVar(&limit, "limit", 0, "list at most this `number` (default all)")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		var err error
		if req.Collection, err = a.optionalRef(collection); err != nil {
			return err
		}
		if req.Labels, err = parseLabels(labels); err != nil {
			return err
		}
		if req.States, err = parseStates[snapshotdv1.Snapshot_State](states, snapshotdv1.Snapshot_State_value); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		l := a.list("snapshots", snapshotHeader...)
		err = pages(limit, func(size int32, token string) (int, string, error) {
			req.PageSize, req.PageToken = size, token
			resp, err := unary(ctx, a, c.Snapshots.ListSnapshots, &req)
			if err != nil {
				return 0, "", err
			}
			for _, s := range resp.GetSnapshots() {
				if err := l.add(s, snapshotCells(s)...); err != nil {
					return 0, "", err
				}
			}
			return len(resp.GetSnapshots()), resp.GetNextPageToken(), l.flush()
		})
		if err != nil {
			return err
		}
		return l.close()
	})
	return cmd
}

func (a *app) snapshotUpdate() *cobra.Command {
	var (
		description, ttl, expireTime string
		labels                       []string
		noLabels, noExpiry           bool
		revision                     int64
	)
	cmd := &cobra.Command{
		Use:   "update SNAPSHOT",
		Short: "Changes a snapshot's description, labels or expiry",
		Long: `Changes a snapshot's description, labels or expiry. Omitted parts stay unchanged; the
given labels replace all existing ones.`,
		Example: `  snapshotctl snapshot update nightly --description 'before the migration' --no-expiry
  snapshotctl snapshot update nightly --label ticket=OPS-7 --label owner=search --ttl 30d`,
	}
	arg := addSnapshotArg(cmd)
	f := cmd.Flags()
	f.StringVar(&description, "description", "", "the new `text`; empty removes it")
	f.StringArrayVar(&labels, "label", nil, "label `key=value`; may be repeated")
	f.BoolVar(&noLabels, "no-labels", false, "remove all labels")
	f.StringVar(&ttl, "ttl", "", "expire this time `span` from now, such as 36h or 30d, at most 36525d (100 years)")
	f.StringVar(&expireTime, "expire-time", "", "expire at this `time` (RFC 3339)")
	f.BoolVar(&noExpiry, "no-expiry", false, "never expire")
	f.Int64Var(&revision, "expected-revision", 0, "fail unless the snapshot has this `revision`")
	cmd.MarkFlagsMutuallyExclusive("label", "no-labels")
	cmd.MarkFlagsMutuallyExclusive("ttl", "expire-time", "no-expiry")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.snapshotRef(arg, args)
		if err != nil {
			return err
		}
		req := &snapshotdv1.UpdateSnapshotRequest{
			Snapshot: ref, UpdateMask: &fieldmaskpb.FieldMask{}, Description: description,
			ExpectedRevision: revision, RequestToken: client.NewRequestToken(),
		}
		change := func(field string) { req.UpdateMask.Paths = append(req.UpdateMask.Paths, field) }
		if f.Changed("description") {
			change("description")
		}
		if len(labels) > 0 || noLabels {
			change("labels")
			if req.Labels, err = parseLabels(labels); err != nil {
				return err
			}
		}
		switch {
		case ttl != "":
			d, err := parseTTL(ttl)
			if err != nil {
				return err
			}
			change("ttl") // relative to the server's clock
			req.Ttl = durationpb.New(d)
		case expireTime != "":
			change("expire_time")
			if req.ExpireTime, err = parseTime(expireTime); err != nil {
				return err
			}
		case noExpiry:
			change("expire_time")
		}
		if len(req.GetUpdateMask().GetPaths()) == 0 {
			return usageErrorf("nothing to change: use a flag such as --description or --label")
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.UpdateSnapshot, req)
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) { renderSnapshot(w, resp.GetSnapshot()) })
	})
	return cmd
}

func (a *app) snapshotDrop() *cobra.Command {
	var (
		expected int64
		dryRun   bool
	)
	cmd := &cobra.Command{
		Use:   "drop SNAPSHOT",
		Short: "Drops a snapshot",
		Long: `Drops a snapshot. Its name is free at once, and it holds no files any more. Dropping a
snapshot that does not exist succeeds. SNAPSHOT is a name, even if it consists of
digits; an id is '#42' or --id 42.

With --dry-run it only shows the effect of a drop: the number of files that nothing
would hold any more. They are deleted by the collector or after a grant; see
` + "`snapshotctl reclaim`" + `.`,
		Example: `  snapshotctl snapshot drop nightly
  snapshotctl snapshot drop nightly --dry-run
  snapshotctl snapshot drop nightly --expected-id 42`,
	}
	arg := addSnapshotArg(cmd)
	cmd.Flags().Int64Var(&expected, "expected-id", 0, "fail unless the snapshot has this `id`")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only show the effect of a drop")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.snapshotRef(arg, args)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.DropSnapshot, &snapshotdv1.DropSnapshotRequest{
			Snapshot: ref, ExpectedId: expected, RequestToken: client.NewRequestToken(), DryRun: dryRun,
		})
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) {
			if dryRun && resp.GetSnapshotId() != 0 {
				renderDryRun(w, a.snapshot, resp)
				return
			}
			renderDropped(w, "snapshot", a.snapshot, resp.GetSnapshotId())
		})
	})
	return cmd
}

// renderDryRun prints the effect of a drop.
func renderDryRun(w io.Writer, name string, r *snapshotdv1.DropSnapshotResponse) {
	u := r.GetUsage()
	fprintf(w, "dry run: snapshot %s", clean(name))
	if !strings.HasPrefix(name, "#") {
		fprintf(w, " (id %d)", r.GetSnapshotId())
	}
	fprintf(w, " could be dropped; nothing was\n")
	fprintf(w, "would free %s\n", filesText(u.GetExclusiveFiles(), u.GetExclusiveBytes()))
	if u.GetSharedFiles() > 0 {
		fprintf(w, "would keep %s: held by the collection, another snapshot or a grant, or not snapshotd's to delete\n",
			filesText(u.GetSharedFiles(), u.GetSharedBytes()))
	}
}

// renderDropped prints the result of a drop; id 0 means that there was nothing to
// drop.
func renderDropped(w io.Writer, thing, name string, id int64) {
	switch {
	case id == 0:
		fprintf(w, "no such %s\n", thing)
	case strings.HasPrefix(name, "#"):
		fprintf(w, "dropped %s %s\n", thing, clean(name))
	default:
		fprintf(w, "dropped %s %s (id %d)\n", thing, clean(name), id)
	}
}
