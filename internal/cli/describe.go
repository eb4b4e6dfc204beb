package cli

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

func (a *app) snapshotDescribe() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "describe SNAPSHOT",
		Short: "Shows what a snapshot captured",
		Long: `Shows the content of a snapshot except its segments: the cut of each channel, schema,
partitions and indexes, and the snapshot's own files; and the number of files that it
holds, alone and together with others. An own file that is missing or has the wrong
length is listed as DAMAGED. SNAPSHOT is a name, even if it consists of digits; an id
is '#42' or --id 42.`,
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
		switch client.Reason(err) { // show the rest without the usage
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

// renderDescription prints the sections of a description. unknown is the reason for a
// missing usage; undo is the arguments of `snapshot drop` for this snapshot.
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

	fprintf(
		w, "\nManifests (%s:%s, format %d, %s)\n", clean(r.GetStore()), clean(r.GetPrefix()), r.GetFormatVersion(),
		size(s.GetManifestBytes()),
	)
	t = newTable(w, "  ", "FILE", "SIZE", "SEGMENTS", "FROM", "SHA256")
	for _, m := range r.GetManifests() {
		t.row(m.GetFile(), size(m.GetSizeBytes()), m.GetSegments(), m.GetFirstOrdinal(), hex.EncodeToString(m.GetSha256()))
	}
	_ = t.flush()

	for _, text := range r.GetDamage() {
		fprintf(w, "DAMAGED: %s\n", clean(text))
	}
	if why := r.GetDamageUnknown(); why != "" {
		fprintf(w, "damage check failed: %s\n", clean(why))
	}

	fprintf(w, "\nholds: %s\n", filesText(n.GetFiles(), n.GetBytes()))
	switch u := r.GetUsage(); {
	case u.GetSharedFiles() > 0:
		fprintf(w, "held by it alone: %s; the others have other holders\n",
			filesText(u.GetExclusiveFiles(), u.GetExclusiveBytes()))
	case u != nil:
		fprintf(w, "held by it alone: %s\n", filesText(u.GetExclusiveFiles(), u.GetExclusiveBytes()))
	case unknown != "":
		fprintf(w, "held by it alone: unknown: %s\n", clean(unknown))
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
		Long:  "Lists a snapshot's segments in id order, without a limit on their number.",
		Example: `  snapshotctl snapshot segments nightly --limit 20
  snapshotctl snapshot segments nightly --files -o json`,
	}
	arg := addSnapshotArg(cmd)
	cmd.Flags().BoolVar(&files, "files", false, "also list the files of each segment")
	cmd.Flags().IntVar(&limit, "limit", 0, "list at most this `number` of segments (default all)")
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

// addSegment prints a segment as one row, or as one row per file.
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
