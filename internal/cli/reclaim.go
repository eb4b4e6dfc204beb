package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

const maxUnits = 10_000 // per call

func (a *app) reclaimCommand() *cobra.Command {
	cmd := group("reclaim", "Checks, grants and confirms deletes",
		`Checks which units may be deleted, and grants and confirms their deletes. A unit is a
dropped segment, a replaced or removed index build, or a file removed from a segment;
it is deleted as a whole.

A unit may be deleted only after a grant. It is granted if no snapshot holds it and no
snapshot being created can. With --deleter snapshotd the server deletes the files.
With --deleter caller you do: request, delete the files that
`+"`reclaim list --files`"+` lists, confirm. Request held units again later.`)
	cmd.Example = `  snapshotctl reclaim check --collection docs --segment 101
  snapshotctl reclaim request --collection docs --segment 101,102 --deleter snapshotd
  snapshotctl reclaim list`
	cmd.AddCommand(a.reclaimCheck(), a.reclaimRequest(), a.reclaimConfirm(), a.reclaimList())
	return cmd
}

// unitFlags are the flags that select units.
type unitFlags struct {
	segments, builds, paths []string
	root                    int32
	file                    string
}

// addUnitFlags adds flags to cmd that set the result.
func addUnitFlags(cmd *cobra.Command) *unitFlags {
	var g unitFlags
	f := cmd.Flags()
	f.StringArrayVar(&g.segments, "segment", nil, "`id` of a segment; may be repeated")
	f.StringArrayVar(&g.builds, "build", nil, "`id` of an index build; may be repeated")
	f.StringArrayVar(&g.paths, "path", nil, "`path` of a file relative to its root, for its unit; may be repeated")
	f.Int32Var(&g.root, "root", 0, "`number` of the root of each --path")
	f.StringVarP(&g.file, "file", "f", "", "`file` of units, one per line; - reads standard input")
	return &g
}

const unitsLong = `Units are given by flags, or with -f by a file with one unit per line, as protobuf
JSON of the message Unit: {"segmentId": 101}, {"indexBuildId": 7}, or
{"file": {"root": 0, "path": "7/8/101/insert/100/1"}}. Their number is unlimited.`

func segmentUnit(id int64) *snapshotdv1.Unit {
	return &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_SegmentId{SegmentId: id}}
}

func buildUnit(id int64) *snapshotdv1.Unit {
	return &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_IndexBuildId{IndexBuildId: id}}
}

func fileUnit(root int32, path string) *snapshotdv1.Unit {
	return &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_File{File: &snapshotdv1.UnitFile{Root: root, Path: path}}}
}

// unitName formats a unit as the user gave it.
func unitName(u *snapshotdv1.Unit) string {
	switch u.GetUnit().(type) {
	case *snapshotdv1.Unit_SegmentId:
		return fmt.Sprintf("segment %d", u.GetSegmentId())
	case *snapshotdv1.Unit_IndexBuildId:
		return fmt.Sprintf("build %d", u.GetIndexBuildId())
	default:
		name := "file " + clean(u.GetFile().GetPath())
		if root := u.GetFile().GetRoot(); root != 0 {
			name += fmt.Sprintf(" (root %d)", root)
		}
		return name
	}
}

// forEachBatch calls send with the units, in batches that fit a call.
func (a *app) forEachBatch(g *unitFlags, send func([]*snapshotdv1.Unit) error) error {
	segments, err := parseIDs(g.segments)
	if err != nil {
		return err
	}
	builds, err := parseIDs(g.builds)
	if err != nil {
		return err
	}
	var (
		batch []*snapshotdv1.Unit
		size  int
	)
	add := func(u *snapshotdv1.Unit) error {
		n := proto.Size(u) + 6 // with tag and length
		if len(batch) == maxUnits || size+n > maxBatchBytes {
			if err := send(batch); err != nil {
				return err
			}
			batch, size = nil, 0
		}
		batch, size = append(batch, u), size+n
		return nil
	}
	var flags []*snapshotdv1.Unit
	for _, id := range segments {
		flags = append(flags, segmentUnit(id))
	}
	for _, id := range builds {
		flags = append(flags, buildUnit(id))
	}
	for _, path := range g.paths {
		flags = append(flags, fileUnit(g.root, path))
	}
	if len(flags) == 0 && g.file == "" {
		return usageErrorf("no units: use --segment, --build, --path or -f")
	}
	for _, u := range flags {
		if err := add(u); err != nil {
			return err
		}
	}
	if g.file != "" {
		name, r, closeFile, err := a.open(g.file)
		if err != nil {
			return err
		}
		defer closeFile()
		if err := unitLines(name, r, add); err != nil {
			return err
		}
	}
	if len(batch) == 0 {
		return nil
	}
	return send(batch)
}

// unitLines reads units, one line of protobuf JSON each. It skips empty lines.
func unitLines(name string, r io.Reader, add func(*snapshotdv1.Unit) error) error {
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		u := new(snapshotdv1.Unit)
		if err := protojson.Unmarshal(line, u); err != nil {
			return usageErrorf("%s, line %d: %s", name, n, plainJSONError(err))
		}
		if u.GetUnit() == nil {
			return usageErrorf(
				`%s, line %d: no unit: use {"segmentId": 101}, {"indexBuildId": 7} or {"file": {"path": "7/8/101/insert/100/1"}}`,
				name, n,
			)
		}
		if err := add(u); err != nil {
			return err
		}
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return usageErrorf("%s: a line is too long for a unit", name)
	case err != nil:
		return fmt.Errorf("read %s: %w", name, err)
	}
	return nil
}

func (a *app) reclaimCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check --collection COLLECTION --segment ID...",
		Short: "Shows the state and the holders of units",
		Long: `Shows the state of units and their holders. It changes nothing and permits nothing:
the result may already be out of date. The exit code is 0 for held and unknown units
too. ` + "`snapshotctl explain`" + ` has more on a single unit.

` + unitsLong,
		Example: `  snapshotctl reclaim check --collection docs --segment 101,102 --build 7
  snapshotctl reclaim check --collection docs --path 7/8/101/insert/100/1
  snapshotctl reclaim check --collection docs -f units.jsonl -o json`,
		Args: exactArgs(),
	}
	collection := addCollection(cmd)
	units := addUnitFlags(cmd)
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		l := a.list("units", "UNIT", "STATE", "HOLDERS", "HELD BY")
		err = a.forEachBatch(units, func(batch []*snapshotdv1.Unit) error {
			resp, err := unary(ctx, a, c.Reclaim.CheckReferences, &snapshotdv1.CheckReferencesRequest{
				Collection: ref, Units: batch,
			})
			if err != nil {
				return err
			}
			for i, u := range resp.GetUnits() {
				holders := heldBy(u.GetHolders(), u.GetHolderCount())
				err := l.add(u, unitName(batch[i]), stateName(u.GetState()), u.GetHolderCount(), holders)
				if err != nil {
					return err
				}
			}
			return l.flush()
		})
		if err != nil {
			return err
		}
		return l.close()
	})
	return cmd
}

// heldBy lists holders in short form; n is their total number.
func heldBy(holders []*snapshotdv1.Holder, n int64) string {
	var names []string
	for _, h := range holders {
		switch h.GetHolder().(type) {
		case *snapshotdv1.Holder_Snapshot:
			names = append(names, clean(h.GetSnapshot().GetName()))
		case *snapshotdv1.Holder_Creating:
			names = append(names, fmt.Sprintf("#%d (being created)", h.GetCreating().GetSnapshotId()))
		case *snapshotdv1.Holder_Catalog:
			names = append(names, "the collection")
		}
	}
	if more := n - int64(len(names)); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// parseDeleter parses --deleter; empty means unspecified.
func parseDeleter(s string) (snapshotdv1.Deleter, error) {
	switch strings.ToLower(s) {
	case "":
		return snapshotdv1.Deleter_DELETER_UNSPECIFIED, nil
	case "snapshotd":
		return snapshotdv1.Deleter_DELETER_SNAPSHOTD, nil
	case "caller":
		return snapshotdv1.Deleter_DELETER_CALLER, nil
	}
	return 0, usageErrorf("--deleter %q: use snapshotd or caller", s)
}

func (a *app) reclaimRequest() *cobra.Command {
	var deleter string
	cmd := &cobra.Command{
		Use:   "request --collection COLLECTION --segment ID... --deleter snapshotd|caller",
		Short: "Requests grants to delete units",
		Long: `Requests grants to delete units; the outcome of each is GRANTED, HELD or UNKNOWN. A
grant is never revoked. A repeated request returns the same grants, so the command can
be repeated. The exit code is 0 for all three outcomes.

With --deleter snapshotd the server deletes the files of granted units in the
background. With --deleter caller you delete exactly the files that
` + "`snapshotctl reclaim list --files`" + ` lists, and then run
` + "`snapshotctl reclaim confirm`" + `.

` + unitsLong,
		Example: `  snapshotctl reclaim request --collection docs --segment 101,102 --deleter snapshotd
  snapshotctl reclaim request --collection '#7' -f units.jsonl --deleter caller`,
		Args: exactArgs(),
	}
	collection := addCollection(cmd)
	units := addUnitFlags(cmd)
	cmd.Flags().StringVar(&deleter, "deleter", "", "the `deleter` of the files: snapshotd or caller (required)")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		by, err := parseDeleter(deleter)
		if err != nil {
			return err
		}
		if by == snapshotdv1.Deleter_DELETER_UNSPECIFIED {
			return usageErrorf("--deleter is missing: use snapshotd or caller")
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		l := a.list("results", "UNIT", "OUTCOME", "TOMBSTONE", "DELETER", "FILES", "SIZE", "HELD BY")
		var sum grantTotals
		err = a.forEachBatch(units, func(batch []*snapshotdv1.Unit) error {
			resp, err := unary(ctx, a, c.Reclaim.Reclaim, &snapshotdv1.ReclaimRequest{
				Collection: ref, Units: batch, Deleter: by,
			})
			if err != nil {
				return err
			}
			for i, r := range resp.GetResults() {
				cells := []any{unitName(batch[i]), strings.TrimPrefix(r.GetOutcome().String(), "OUTCOME_"), "-", "-", "-", "-", "-"}
				if t := r.GetTombstone(); t != nil {
					copy(cells[2:], []any{t.GetId(), enumName(t.GetDeleter(), "DELETER_"), t.GetFileCount(), size(t.GetBytes())})
				}
				cells[6] = heldBy(r.GetHolders(), r.GetHolderCount())
				if err := l.add(r, cells...); err != nil {
					return err
				}
				sum.add(r)
			}
			return l.flush()
		})
		if err != nil {
			return err
		}
		if err := l.close(); err != nil || a.output != formatTable {
			return err
		}
		fprintf(a.out, "%s", sum.text(*collection))
		return nil
	})
	return cmd
}

// grantTotals sums up the results of a request, which may name a unit more than once.
type grantTotals struct {
	bySnapshotd, byCallers map[int64]*snapshotdv1.Tombstone // by id, for each deleter
	held                   int
}

func (g *grantTotals) add(r *snapshotdv1.ReclaimResult) {
	switch {
	case r.GetOutcome() == snapshotdv1.ReclaimResult_OUTCOME_HELD:
		g.held++
	case r.GetTombstone() == nil:
	case r.GetTombstone().GetDeleter() == snapshotdv1.Deleter_DELETER_CALLER:
		if g.byCallers == nil {
			g.byCallers = map[int64]*snapshotdv1.Tombstone{}
		}
		g.byCallers[r.GetTombstone().GetId()] = r.GetTombstone()
	default:
		if g.bySnapshotd == nil {
			g.bySnapshotd = map[int64]*snapshotdv1.Tombstone{}
		}
		g.bySnapshotd[r.GetTombstone().GetId()] = r.GetTombstone()
	}
}

// text formats the totals with the next steps.
func (g *grantTotals) text(collection string) string {
	var b strings.Builder
	sum := func(ts map[int64]*snapshotdv1.Tombstone) string {
		var files, bytes int64
		for _, t := range ts {
			files, bytes = files+t.GetFileCount(), bytes+t.GetBytes()
		}
		return filesText(files, bytes)
	}
	if len(g.bySnapshotd) > 0 {
		fprintf(&b, "snapshotd deletes %s\n", sum(g.bySnapshotd))
	}
	if len(g.byCallers) > 0 {
		of := shellQuote(collection, "")
		fprintf(
			&b, "to be deleted by you: %s; list them with `snapshotctl reclaim list --collection %s --deleter caller --files`\n",
			sum(g.byCallers), of,
		)
		fprintf(&b, "then: snapshotctl reclaim confirm --collection %s TOMBSTONE...\n", of)
	}
	if g.held > 0 {
		fprintf(&b, "held: %s; request again when their holders are gone\n", count(g.held, "unit"))
	}
	return b.String()
}

func (a *app) reclaimConfirm() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "confirm TOMBSTONE... --collection COLLECTION",
		Short: "Confirms that the files of granted units are deleted",
		Long: `Confirms that all files of units granted to a caller are deleted. It removes their
tombstones; a file that still exists is then an orphan. A tombstone that was confirmed
before is UNKNOWN, which is not an error. The exit code is 5 if snapshotd is the
deleter of one (FOREIGN).`,
		Example: "  snapshotctl reclaim confirm --collection docs 101 102",
		Args:    cobra.ArbitraryArgs,
	}
	collection := addCollection(cmd)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		if len(args) == 0 {
			return usageErrorf("TOMBSTONE is missing; `snapshotctl reclaim list` lists them")
		}
		ids, err := parseIDs(args)
		if err != nil {
			return err
		}
		seen := make(map[int64]bool, len(ids)) // the API accepts each once
		ids = slices.DeleteFunc(ids, func(id int64) bool { duplicate := seen[id]; seen[id] = true; return duplicate })
		c, err := a.connect()
		if err != nil {
			return err
		}
		l := a.list("results", "TOMBSTONE", "OUTCOME")
		foreign := 0
		for part := range slices.Chunk(ids, maxUnits) {
			resp, err := unary(ctx, a, c.Reclaim.ConfirmReclaimed, &snapshotdv1.ConfirmReclaimedRequest{
				Collection: ref, TombstoneIds: part,
			})
			if err != nil {
				return err
			}
			for _, r := range resp.GetResults() {
				if r.GetOutcome() == snapshotdv1.ConfirmResult_OUTCOME_FOREIGN {
					foreign++
				}
				if err := l.add(r, r.GetTombstoneId(), strings.TrimPrefix(r.GetOutcome().String(), "OUTCOME_")); err != nil {
					return err
				}
			}
		}
		if err := l.close(); err != nil {
			return err
		}
		if foreign > 0 {
			return &hintError{
				status.Errorf(codes.FailedPrecondition, "snapshotd is the deleter of %s", count(foreign, "tombstone")),
				"it confirms them by itself; list them with `snapshotctl reclaim list --deleter snapshotd`",
			}
		}
		return nil
	})
	return cmd
}

func (a *app) reclaimList() *cobra.Command {
	var (
		deleter string
		files   bool
		limit   int
	)
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Lists unconfirmed grants",
		Long: `Lists tombstones, the unconfirmed grants, ordered by collection and tombstone id. One
that stays long was granted to a caller that failed, or its files cannot be deleted.
--files lists the files to delete; -o json and yaml always include them.`,
		Example: `  snapshotctl reclaim list
  snapshotctl reclaim list --collection docs --deleter caller --files`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	collection := addOptionalCollection(cmd, "only of this `collection`")
	f.StringVar(&deleter, "deleter", "", "only those of this `deleter`: snapshotd or caller")
	f.BoolVar(&files, "files", false, "also list the files of each")
	f.IntVar(&limit, "limit", 0, "list at most this `number` of tombstones (default all)")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		var (
			req snapshotdv1.ListTombstonesRequest
			err error
		)
		if req.Collection, err = a.optionalRef(collection); err != nil {
			return err
		}
		if req.Deleter, err = parseDeleter(deleter); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		header := []string{"TOMBSTONE", "COLLECTION", "KIND", "SEGMENT", "DELETER", "CALLER", "GRANTED", "FILES", "SIZE"}
		if files {
			header = []string{"TOMBSTONE", "COLLECTION", "SIZE", "STORE", "KEY"}
		}
		l := a.list("tombstones", header...)
		err = pages(limit, func(size int32, token string) (int, string, error) {
			req.PageSize, req.PageToken = size, token
			resp, err := unary(ctx, a, c.Reclaim.ListTombstones, &req)
			if err != nil {
				return 0, "", err
			}
			for _, t := range resp.GetTombstones() {
				if err := addTombstone(l, t, files); err != nil {
					return 0, "", err
				}
			}
			return len(resp.GetTombstones()), resp.GetNextPageToken(), l.flush()
		})
		if err != nil {
			return err
		}
		return l.close()
	})
	return cmd
}

// addTombstone prints a tombstone as one row, or as one row per file.
func addTombstone(l *list, t *snapshotdv1.Tombstone, files bool) error {
	of := fmt.Sprintf("#%d", t.GetCollectionId())
	if !files || l.app.output != formatTable {
		return l.add(
			t, t.GetId(), of, enumName(t.GetKind(), "KIND_"), t.GetSegmentId(), enumName(t.GetDeleter(), "DELETER_"),
			t.GetCaller(),
			t.GetGrantTime(), t.GetFileCount(), size(t.GetBytes()),
		)
	}
	for _, f := range t.GetFiles() {
		l.table.row(t.GetId(), of, size(f.GetSize()), f.GetStore(), f.GetKey())
	}
	return nil
}
