package cli

import (
	"context"
	"encoding/hex"
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

A snapshot is a point-in-time capture of a collection. It holds no data of its
own: it references files where they lie and keeps them from being deleted.`)
	cmd.Example = `  snapshotctl snapshot create nightly --collection docs
  snapshotctl snapshot describe nightly`
	cmd.AddCommand(
		a.snapshotCreate(), a.snapshotGet(), a.snapshotDescribe(), a.snapshotSegments(),
		a.snapshotList(), a.snapshotUpdate(), a.snapshotDrop(),
	)
	return cmd
}

// chosen says which snapshot a command is about.
type snapshotArg struct {
	id         int64
	collection *optionalCollection
}

// choose gives cmd the flags and the argument that fill the result.
func addSnapshotArg(cmd *cobra.Command) *snapshotArg {
	var c snapshotArg
	cmd.Flags().Int64Var(&c.id, "id", 0, "the snapshot's `id`, instead of SNAPSHOT")
	c.collection = addOptionalCollection(cmd, "the snapshot's `collection`: needed where several have a snapshot of that name, else checked")
	cmd.Args = func(cmd *cobra.Command, argv []string) error {
		switch {
		case !cmd.Flags().Changed("id"):
			return exactArgs("SNAPSHOT")(cmd, argv)
		case len(argv) > 0:
			return asUsageError(cmd, fmt.Errorf("both --id and %q are given", clean(argv[0])))
		case c.id <= 0:
			return asUsageError(cmd, fmt.Errorf("--id %d: ids are positive numbers", c.id))
		}
		return nil
	}
	return &c
}

// ref returns the snapshot that the user chose.
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

// collectionRef returns the collection that the user named.
func (a *app) collectionRef(s string) (*snapshotdv1.CollectionRef, error) {
	a.collection = s
	return parseCollection(s)
}

func (a *app) snapshotCreate() *cobra.Command {
	var (
		collection, description, ttl, expireTime, token string
		labels, minCut                                  []string
		exact, verify, noWait                           bool
	)
	cmd := &cobra.Command{
		Use:   "create NAME --collection COLLECTION",
		Short: "Takes a snapshot of a collection",
		Long: `Takes a snapshot of a collection as of now. No file is copied or moved.

The server goes on when snapshotctl stops waiting. To wait again, run the same
command with the --request-token that is printed then; a token repeats exactly
one request, for 24 hours.`,
		Example: `  snapshotctl snapshot create nightly --collection docs --ttl 30d
  snapshotctl snapshot create before-upgrade --collection prod/docs --label ticket=OPS-7 --verify
  snapshotctl snapshot create exact --collection '#7' --min-cut 0=4500,1=4500 --require-exact --timeout 1m`,
		Args: exactArgs("NAME"),
	}
	f := cmd.Flags()
	f.StringVar(&collection, "collection", "", "`collection` to capture (required)")
	f.StringVar(&description, "description", "", "free `text` for people")
	f.StringArrayVar(&labels, "label", nil, "label `key=value`; may be repeated")
	f.StringVar(&ttl, "ttl", "", "let it be dropped by itself so long after the commit: a time `span` such as 36h or 30d, at most 36525d (100 years)")
	f.StringVar(&expireTime, "expire-time", "", "let it be dropped by itself at this `time` (RFC 3339)")
	f.StringArrayVar(&minCut, "min-cut", nil, "wait until a channel's checkpoint has reached this position: `shard=timestamp`; may be repeated")
	f.BoolVar(&exact, "require-exact", false, "refuse when a segment has rows on both sides of the cut")
	f.BoolVar(&verify, "verify", false, "ask the object store for every file, and refuse when one is missing or altered")
	f.BoolVar(&noWait, "no-wait", false, "return as soon as the snapshot is sure to be worked on; with --min-cut that is once the cut is reached")
	f.StringVar(&token, "request-token", "", "`token` of an earlier run of the same command, to join it")
	cmd.MarkFlagsMutuallyExclusive("ttl", "expire-time")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		if collection == "" {
			return usageErrorf("--collection is missing: which collection is to be captured?")
		}
		a.snapshot = args[0]
		req := &snapshotdv1.CreateSnapshotRequest{
			Name: args[0], Description: description,
			RequireExact: exact, Verify: verify, RequestToken: token,
		}
		var err error
		if req.Collection, err = a.collectionRef(collection); err != nil {
			return err
		}
		if req.Labels, err = parseLabels(labels); err != nil {
			return err
		}
		if req.MinCut, err = parsePositions(minCut); err != nil {
			return err
		}
		switch {
		case ttl != "":
			d, err := parseTTL(ttl)
			if err != nil {
				return err
			}
			req.Expiry = &snapshotdv1.CreateSnapshotRequest_Ttl{Ttl: durationpb.New(d)}
		case expireTime != "":
			t, err := parseTime(expireTime)
			if err != nil {
				return err
			}
			req.Expiry = &snapshotdv1.CreateSnapshotRequest_ExpireTime{ExpireTime: t}
		}
		if noWait {
			req.Wait = new(bool)
		}
		if req.RequestToken == "" {
			req.RequestToken = client.NewRequestToken()
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
					"the server goes on with it; see how it is with `snapshotctl snapshot get %s`, or wait again by adding --request-token %s",
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
		fprintf(w, "written for the snapshot: %s; its data stay where they are\n", size(s.GetManifestBytes()))
	}
}

// cut returns the cuts of all channels in short.
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

// origin names the collection that something belongs to.
func collectionName(c *snapshotdv1.CollectionInfo) string {
	return fullName(c.GetDb(), c.GetName(), c.GetId())
}

// fullName names a collection in a way that the commands take.
func fullName(db, name string, id int64) string {
	if name == "" {
		return fmt.Sprintf("#%d", id)
	}
	return db + "/" + name
}

var snapshotHeader = []string{"NAME", "ID", "STATE", "COLLECTION", "SEGMENTS", "ROWS", "FILES", "SIZE", "CREATED", "EXPIRES", "LABELS"}

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
		Long: `Shows a snapshot's record. SNAPSHOT is a name, be it one of digits; an id is
given as '#42' or with --id 42.`,
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

func (a *app) snapshotDescribe() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "describe SNAPSHOT",
		Short: "Shows what a snapshot captured",
		Long: `Shows what a snapshot captured, but for its segments: the cut of each channel,
schema, partitions and indexes, and the snapshot's own files; and what it keeps:
how many files, and how many of them nothing else needs. A file of its own that is
missing or has another length is named as DAMAGED. SNAPSHOT is a name, be
it one of digits; an id is given as '#42' or with --id 42.`,
		Example: `  snapshotctl snapshot describe nightly
  snapshotctl snapshot describe '#42' -o yaml`,
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
		req := &snapshotdv1.DescribeSnapshotRequest{Snapshot: ref, IncludeUsage: true}
		resp, err := unary(ctx, a, c.DescribeWhole, req)
		unknown := ""
		switch client.Reason(err) { // the rest can be shown without
		case "REFERENCES_LOADING", "REFERENCES_UNREADABLE", "SNAPSHOT_CORRUPT":
			unknown, _ = errorText(err)
			req.IncludeUsage = false
			resp, err = unary(ctx, a, c.DescribeWhole, req)
		}
		if err != nil {
			return err
		}
		undo := shellQuote(resp.GetSnapshot().GetName(), "")
		if arg.collection.text != "" {
			undo += " --collection " + shellQuote(arg.collection.text, "")
		}
		return a.print(resp, func(w io.Writer) { renderDescription(w, resp, unknown, undo) })
	})
	return cmd
}

// renderDescription prints sections; unknown is why there is no usage, and undo
// what `snapshot drop` takes to drop this snapshot.
func renderDescription(w io.Writer, r *snapshotdv1.DescribeSnapshotResponse, unknown, undo string) {
	s, c := r.GetSnapshot(), r.GetCollection()
	n := s.GetTotals()
	expires := "never"
	if s.GetExpireTime() != nil {
		expires = formatTime(s.GetExpireTime())
	}
	fprintf(w, "Snapshot\n")
	keyValues(w, "  ",
		"name", s.GetName(),
		"id", s.GetId(),
		"state", stateName(s.GetState()),
		"description", s.GetDescription(),
		"labels", formatMap(s.GetLabels()),
		"created", s.GetCreateTime(),
		"committed", s.GetCommitTime(),
		"expires", expires,
		"catalog revision", s.GetCatalogRevision(),
		"segments", n.GetSegments(),
		"rows", n.GetRows(),
		"index builds", n.GetBuilds(),
		"segments across the cut", n.GetStraddlingSegments(),
	)

	fprintf(w, "\nCut\n")
	t := newTable(w, "  ", "SHARD", "CHANNEL", "ROWS BEFORE")
	for _, p := range s.GetCuts() {
		t.row(p.GetShard(), p.GetChannel(), dataTime(p.GetPosition().GetTimestamp()))
	}
	_ = t.flush() // w is memory, here and below

	fprintf(w, "\nCollection\n")
	info := s.GetCollection()
	keyValues(w, "  ",
		"name", fullName(info.GetDb(), info.GetName(), info.GetId()),
		"id", info.GetId(),
		"layout", enumName(c.GetLayout(), "LAYOUT_"),
		"consistency level", c.GetConsistencyLevel(),
		"properties", formatMap(c.GetProperties()),
		"attributes", formatMap(c.GetAttributes()),
	)
	renderRoots(w, c.GetRoots())
	renderSchema(w, c.GetSchema())
	renderPartitions(w, r.GetPartitions())
	renderIndexes(w, r.GetIndexes())

	fprintf(w, "\nManifests (%s:%s, format %d, %s)\n", clean(r.GetStore()), clean(r.GetPrefix()), r.GetFormatVersion(), size(s.GetManifestBytes()))
	t = newTable(w, "  ", "FILE", "SIZE", "SEGMENTS", "FROM", "SHA256")
	for _, m := range r.GetManifests() {
		t.row(m.GetFile(), size(m.GetSizeBytes()), m.GetSegments(), m.GetFirstOrdinal(), hex.EncodeToString(m.GetSha256()))
	}
	_ = t.flush()

	for _, text := range r.GetDamage() {
		fprintf(w, "DAMAGED: %s\n", clean(text))
	}
	if why := r.GetDamageUnknown(); why != "" {
		fprintf(w, "whether all its files are there is not known: %s\n", clean(why))
	}

	fprintf(w, "\nprotects: %s, %s\n", count(n.GetFiles(), "file"), size(n.GetBytes()))
	switch u := r.GetUsage(); {
	case u.GetSharedFiles() > 0:
		fprintf(w, "kept by it alone: %s, %s; the others stay without it\n", count(u.GetExclusiveFiles(), "file"), size(u.GetExclusiveBytes()))
	case u != nil:
		fprintf(w, "kept by it alone: %s, %s\n", count(u.GetExclusiveFiles(), "file"), size(u.GetExclusiveBytes()))
	case unknown != "":
		fprintf(w, "kept by it alone: not known: %s\n", clean(unknown))
	}
	fprintf(w, "to undo: snapshotctl snapshot drop %s\n", undo)
}

func renderRoots(w io.Writer, roots []*snapshotdv1.Root) {
	fprintf(w, "\nRoots\n")
	t := newTable(w, "  ", "ROOT", "STORE", "PREFIX")
	for i, r := range roots {
		t.row(i, r.GetStore(), r.GetPrefix())
	}
	_ = t.flush() // w is memory
}

func renderSchema(w io.Writer, s *snapshotdv1.Schema) {
	fprintf(w, "\nSchema")
	if s.GetSchemaFormat() != "" {
		fprintf(w, " (%s, %s raw)", clean(s.GetSchemaFormat()), size(int64(len(s.GetSchemaRaw()))))
	}
	fprintf(w, "\n")
	t := newTable(w, "  ", "FIELD", "NAME", "TYPE", "KEY", "NULLABLE", "PARAMETERS")
	for _, f := range s.GetFields() {
		kind := f.GetDataType()
		if f.GetElementType() != "" {
			kind += "<" + f.GetElementType() + ">"
		}
		key := "-"
		switch {
		case f.GetPrimaryKey():
			key = "primary"
		case f.GetPartitionKey():
			key = "partition"
		}
		t.row(f.GetId(), f.GetName(), kind, key, f.GetNullable(), formatMap(f.GetTypeParams()))
	}
	_ = t.flush() // w is memory
}

func renderPartitions(w io.Writer, ps []*snapshotdv1.Partition) {
	fprintf(w, "\nPartitions\n")
	t := newTable(w, "  ", "NAME", "ID", "STATE", "ATTRIBUTES")
	for _, p := range ps {
		t.row(p.GetName(), p.GetId(), stateName(p.GetState()), formatMap(p.GetAttributes()))
	}
	_ = t.flush() // w is memory
}

func renderIndexes(w io.Writer, is []*snapshotdv1.Index) {
	fprintf(w, "\nIndexes\n")
	t := newTable(w, "  ", "NAME", "ID", "FIELD", "STATE", "PARAMETERS")
	for _, i := range is {
		t.row(i.GetName(), i.GetId(), i.GetFieldId(), stateName(i.GetState()), formatMap(i.GetIndexParams()))
	}
	_ = t.flush() // w is memory
}

func (a *app) snapshotSegments() *cobra.Command {
	var (
		files bool
		limit int
	)
	cmd := &cobra.Command{
		Use:   "segments SNAPSHOT",
		Short: "Lists a snapshot's segments",
		Long:  "Lists a snapshot's segments in id order, as they come, whatever their number.",
		Example: `  snapshotctl snapshot segments nightly --limit 20
  snapshotctl snapshot segments nightly --files -o json`,
	}
	arg := addSnapshotArg(cmd)
	cmd.Flags().BoolVar(&files, "files", false, "list the files of each segment, too")
	cmd.Flags().IntVar(&limit, "limit", 0, "list so `many` segments (default all)")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.snapshotRef(arg, args)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		req := &snapshotdv1.ListSnapshotSegmentsRequest{Snapshot: ref, View: snapshotdv1.SegmentView_SEGMENT_VIEW_BASIC}
		header := []string{"SEGMENT", "PARTITION", "SHARD", "LEVEL", "STATE", "ROWS", "CEILING", "FILES", "SIZE"}
		if files {
			req.View = snapshotdv1.SegmentView_SEGMENT_VIEW_FILES
			header = []string{"SEGMENT", "BUILD", "KIND", "SIZE", "ROOT", "PATH"}
		}
		l := a.list("segments", header...)
		err = pages(limit, func(size int32, token string) (int, string, error) {
			req.PageSize, req.PageToken = size, token
			resp, err := unary(ctx, a, c.Snapshots.ListSnapshotSegments, req)
			if err != nil {
				return 0, "", err
			}
			for _, s := range resp.GetSegments() {
				if err := addSegment(l, s, files); err != nil {
					return 0, "", err
				}
			}
			return len(resp.GetSegments()), resp.GetNextPageToken(), l.flush()
		})
		if err != nil {
			return err
		}
		return l.close()
	})
	return cmd
}

// addSegment prints a segment: as a row, or as one for each of its files.
func addSegment(l *list, s *snapshotdv1.SnapshotSegment, files bool) error {
	g := s.GetSegment()
	if !files || l.app.output != formatTable {
		partition := "all"
		if g.GetPartitionId() != 0 {
			partition = fmt.Sprint(g.GetPartitionId())
		}
		ceiling := "-"
		if g.GetRowCeiling() != 0 {
			ceiling = dataTime(g.GetRowCeiling())
		}
		return l.add(
			s, g.GetId(), partition, g.GetShard(), strings.TrimPrefix(g.GetLevel().String(), "LEVEL_"), stateName(g.GetState()),
			g.GetRows(), ceiling, s.GetFiles(), size(s.GetBytes()),
		)
	}
	add := func(build string, f *snapshotdv1.File) {
		l.table.row(g.GetId(), build, f.GetKind(), size(f.GetSizeBytes()), f.GetRoot(), f.GetPath())
	}
	for _, f := range g.GetFiles() {
		add("-", f)
	}
	for _, b := range g.GetIndexBuilds() {
		for _, f := range b.GetFiles() {
			add(fmt.Sprint(b.GetId()), f)
		}
	}
	return nil
}

// maxPage is the most that the server puts on a page.
const maxPage = 1000

// pages calls fetch for one page after the other until there are no more, or
// limit items were seen; 0 is no limit.
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
		Long: `Lists snapshots, newest first. All filters must hold; of several states, one.
Snapshots of a dropped collection are found by its id.`,
		Example: `  snapshotctl snapshot list
  snapshotctl snapshot list --collection docs --label ticket=OPS-7
  snapshotctl snapshot list --collection '#7' --state pending,committed,deleting --limit 10`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	collection := addOptionalCollection(cmd, "only of this `collection`")
	f.StringVar(&req.Db, "db", "", "only of collections in this `database`")
	f.Int64Var(&req.PartitionId, "partition", 0, "only those that cover the partition with this `id`")
	f.StringArrayVar(&labels, "label", nil, "only those with this label `key=value`; may be repeated")
	f.StringSliceVar(&states, "state", nil, "only in these `states`: pending, committed, deleting (default committed)")
	f.StringVar(&req.NamePrefix, "prefix", "", "only those whose name begins with this `text`")
	f.IntVar(&limit, "limit", 0, "list so `many` (default all)")
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
		Long: `Changes a snapshot's description, labels or expiry. What is not given stays as
it is; the labels that are given take the place of all that it has.`,
		Example: `  snapshotctl snapshot update nightly --description 'before the migration' --no-expiry
  snapshotctl snapshot update nightly --label ticket=OPS-7 --label owner=search --ttl 30d`,
	}
	arg := addSnapshotArg(cmd)
	f := cmd.Flags()
	f.StringVar(&description, "description", "", "the new `text`; empty takes it away")
	f.StringArrayVar(&labels, "label", nil, "label `key=value`; may be repeated")
	f.BoolVar(&noLabels, "no-labels", false, "take all labels away")
	f.StringVar(&ttl, "ttl", "", "let it be dropped by itself so long from now: a time `span` such as 36h or 30d, at most 36525d (100 years)")
	f.StringVar(&expireTime, "expire-time", "", "let it be dropped by itself at this `time` (RFC 3339)")
	f.BoolVar(&noExpiry, "no-expiry", false, "keep it until it is dropped")
	f.Int64Var(&revision, "expected-revision", 0, "refuse unless the snapshot has this `revision`")
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
			change("ttl") // from now on by the server's time
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
			return usageErrorf("nothing to change: give a flag such as --description or --label")
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
		Long: `Drops a snapshot. Its name is free at once, and it protects no file any more.
Dropping one that does not exist is success. SNAPSHOT is a name, be it one of
digits; an id is given as '#42' or with --id 42.

With --dry-run it only says what a drop would do and which files nothing would
hold any more. They are deleted when their deletion is asked for and granted;
see ` + "`snapshotctl reclaim`" + `.`,
		Example: `  snapshotctl snapshot drop nightly
  snapshotctl snapshot drop nightly --dry-run
  snapshotctl snapshot drop nightly --expected-id 42`,
	}
	arg := addSnapshotArg(cmd)
	cmd.Flags().Int64Var(&expected, "expected-id", 0, "refuse unless the name stands for the snapshot with this `id`")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what a drop would do, and what it would free")
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

// renderDryRun says what a drop of the snapshot with this name would do.
func renderDryRun(w io.Writer, name string, r *snapshotdv1.DropSnapshotResponse) {
	u := r.GetUsage()
	fprintf(w, "dry run: snapshot %s", clean(name))
	if !strings.HasPrefix(name, "#") {
		fprintf(w, " (id %d)", r.GetSnapshotId())
	}
	fprintf(w, " could be dropped; nothing was\n")
	fprintf(w, "would free %s, %s\n", count(u.GetExclusiveFiles(), "file"), size(u.GetExclusiveBytes()))
	if u.GetSharedFiles() > 0 {
		fprintf(w, "would leave %s, %s: the collection, another snapshot or a grant accounts for them, or they are not snapshotd's to delete\n",
			count(u.GetSharedFiles(), "file"), size(u.GetSharedBytes()))
	}
}

// renderDropped says what a drop of a thing with this name did; id 0 is that
// there was none.
func renderDropped(w io.Writer, thing, name string, id int64) {
	switch {
	case id == 0:
		fprintf(w, "there was no such %s\n", thing)
	case strings.HasPrefix(name, "#"):
		fprintf(w, "dropped %s %s\n", thing, clean(name))
	default:
		fprintf(w, "dropped %s %s (id %d)\n", thing, clean(name), id)
	}
}
