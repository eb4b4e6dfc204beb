package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

func (a *app) explainCommand() *cobra.Command {
	var (
		build int64
		root  int32
	)
	cmd := &cobra.Command{
		Use:   "explain SEGMENT_ID|FILE_PATH --collection COLLECTION",
		Short: "Explains what holds a segment, index build or file, and why",
		Long: `Explains what holds a segment, an index build or a file, why, and when it can be
deleted. A number is a segment id; --build takes the id of an index build instead. A
file is given by its path relative to its root, or by its key in the object store. A
dropped collection is given by its id.

This is advice: only a grant of ` + "`snapshotctl reclaim request`" + ` permits a delete.`,
		Example: `  snapshotctl explain --collection docs 101
  snapshotctl explain --collection docs engine/7/8/101/insert/100/1
  snapshotctl explain --collection '#7' --build 201 -o json`,
	}
	collection := addCollection(cmd)
	f := cmd.Flags()
	f.Int64Var(&build, "build", 0, "`id` of an index build, instead of SEGMENT_ID or FILE_PATH")
	f.Int32Var(&root, "root", 0, "`number` of the file's root (default: any)")
	cmd.Args = func(cmd *cobra.Command, argv []string) error {
		switch {
		case !cmd.Flags().Changed("build"):
			return exactArgs("SEGMENT_ID or FILE_PATH")(cmd, argv)
		case len(argv) > 0:
			return asUsageError(cmd, fmt.Errorf("--build and %q exclude each other", clean(argv[0])))
		case build <= 0:
			return asUsageError(cmd, fmt.Errorf("--build %d: ids are positive numbers", build))
		}
		return nil
	}
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		if root < 0 {
			return usageErrorf("--root %d: roots are numbered from 0", root)
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		got, err := unary(ctx, a, c.Catalog.GetCollection, &snapshotdv1.GetCollectionRequest{Collection: ref})
		if err != nil {
			return err
		}
		col := got.GetCollection()
		var candidates []*snapshotdv1.Unit
		if build > 0 {
			candidates = append(candidates, buildUnit(build))
		} else if candidates, err = nameCandidates(args[0], col.GetRoots(), root, f.Changed("root")); err != nil {
			return err
		}
		if len(candidates) == 0 {
			name := fullName(col.GetDb(), col.GetName(), col.GetId())
			return usageErrorf("--root %d: %s has %s", root, name, count(len(col.GetRoots()), "root"))
		}
		// By id, so that both calls address the same collection.
		resp, err := unary(ctx, a, c.Reclaim.CheckReferences, &snapshotdv1.CheckReferencesRequest{
			Collection: idRef(col.GetId()), Units: candidates,
		})
		if err != nil {
			return err
		}
		// Take the first candidate that has a record.
		at := max(0, slices.IndexFunc(resp.GetUnits(), func(u *snapshotdv1.UnitReferences) bool {
			return u.GetState() != snapshotdv1.UnitReferences_STATE_UNKNOWN || u.GetHolderCount() > 0
		}))
		if at >= len(resp.GetUnits()) {
			return fmt.Errorf("the server returned %d of %d units", len(resp.GetUnits()), len(candidates))
		}
		unit, found := candidates[at], resp.GetUnits()[at]
		resp.Units = []*snapshotdv1.UnitReferences{found}
		return a.print(resp, func(w io.Writer) { renderExplanation(w, col, *collection, unit, found) })
	})
	return cmd
}

// nameCandidates returns the units that a name may denote: the segment of a number, or
// files. It returns none if root does not exist.
func nameCandidates(name string, roots []*snapshotdv1.Root, root int32, fixedRoot bool) ([]*snapshotdv1.Unit, error) {
	id, err := strconv.ParseInt(name, 10, 64)
	if err != nil {
		return fileCandidates(name, roots, root, fixedRoot), nil //nolint:nilerr // what is no number is a file's name
	}
	if id <= 0 {
		return nil, usageErrorf("%q is not an id: ids are positive numbers", name)
	}
	return []*snapshotdv1.Unit{segmentUnit(id)}, nil
}

// fileCandidates returns the files that a name may denote: a path in each root (or in
// one root), and a key that begins with the root's prefix.
func fileCandidates(name string, roots []*snapshotdv1.Root, root int32, fixedRoot bool) []*snapshotdv1.Unit {
	var paths, keys []*snapshotdv1.Unit
	for i, r := range roots {
		if fixedRoot && int32(i) != root {
			continue
		}
		paths = append(paths, fileUnit(int32(i), name))
		if rest, ok := strings.CutPrefix(name, r.GetPrefix()); ok && r.GetPrefix() != "" && rest != "" {
			keys = append(keys, fileUnit(int32(i), rest))
		}
	}
	return append(paths, keys...)
}

// renderExplanation explains a unit in sentences. as is the collection as the user
// named it.
func renderExplanation(
	w io.Writer, col *snapshotdv1.Collection, as string, unit *snapshotdv1.Unit, u *snapshotdv1.UnitReferences,
) {
	what, of := unitName(unit), fmt.Sprintf(
		"%s (%d)", clean(fullName(col.GetDb(), col.GetName(), col.GetId())), col.GetId(),
	)
	holders := explainHolders(u)
	switch u.GetState() {
	case snapshotdv1.UnitReferences_STATE_LIVE:
		segment := liveSegment(u)
		if unit.GetSegmentId() == 0 && segment != 0 {
			what += fmt.Sprintf(", of segment %d,", segment)
		}
		fprintf(w, "%s is part of %s.\n", what, of)
		printPhrases(w, "It is also", holders)
		fprintf(w, "It can be deleted after it is dropped or replaced")
		if segment != 0 {
			fprintf(w, ": snapshotctl catalog drop-segments --collection %s %d", shellQuote(as, ""), segment)
		}
		fprintf(w, "\n")
	case snapshotdv1.UnitReferences_STATE_DROPPED:
		fprintf(w, "%s was dropped from %s.\n", what, of)
		if u.GetHolderCount() == 0 {
			fprintf(
				w, "Nothing holds it. To delete it: snapshotctl reclaim request --collection %s %s --deleter snapshotd\n",
				shellQuote(as, ""), unitArgs(unit),
			)
			return
		}
		printPhrases(w, "It is", holders)
		explainRelease(w, u)
	case snapshotdv1.UnitReferences_STATE_GRANTED:
		t := u.GetTombstone()
		files := filesText(t.GetFileCount(), t.GetBytes())
		fprintf(w, "%s was dropped from %s. No snapshot needs it.\n", what, of)
		if t.GetDeleter() != snapshotdv1.Deleter_DELETER_CALLER {
			fprintf(w, "It was granted to snapshotd at %s, which deletes it: %s.\n", formatTime(t.GetGrantTime()), files)
			return
		}
		by := "an unnamed caller"
		if t.GetCaller() != "" {
			by = "caller " + clean(t.GetCaller())
		}
		fprintf(
			w, "It was granted to %s at %s, and the delete is not confirmed: %s.\n", by, formatTime(t.GetGrantTime()), files,
		)
		fprintf(w, "After deleting them: snapshotctl reclaim confirm --collection %s %d\n", shellQuote(as, ""), t.GetId())
	default:
		fprintf(w, "%s is unknown in %s: never registered, or reclaimed and confirmed.\n", what, of)
		if unit.GetIndexBuildId() != 0 {
			fprintf(w, "It may still be part of the collection: check its segment or one of its files.\n")
		}
		printPhrases(w, "It is", holders)
		if u.GetHolderCount() == 0 {
			fprintf(w, "snapshotd never grants an unknown unit; whether to delete it is up to you.\n")
		}
	}
}

// liveSegment returns the segment that a live unit belongs to, 0 if none.
func liveSegment(u *snapshotdv1.UnitReferences) int64 {
	for _, h := range u.GetHolders() {
		if h.GetCatalog() != nil {
			return h.GetCatalog().GetSegmentId()
		}
	}
	return 0
}

// explainHolders returns a phrase for each holder except the collection.
func explainHolders(u *snapshotdv1.UnitReferences) []string {
	var list []string
	listed := int64(0)
	for _, h := range u.GetHolders() {
		listed++
		switch h.GetHolder().(type) {
		case *snapshotdv1.Holder_Snapshot:
			s := h.GetSnapshot()
			list = append(list, fmt.Sprintf(
				"held by snapshot %s (%d)%s", clean(s.GetName()), s.GetSnapshotId(), explainPins(s.GetPins()),
			))
		case *snapshotdv1.Holder_Creating:
			list = append(list, fmt.Sprintf(
				"possibly held by a snapshot that is being created (%d)", h.GetCreating().GetSnapshotId(),
			))
		}
	}
	if more := u.GetHolderCount() - listed; more > 0 {
		list = append(list, fmt.Sprintf("held by %d more", more))
	}
	return list
}

// explainPins lists the pins of a snapshot as a clause.
func explainPins(pins []*snapshotdv1.Pin) string {
	var b strings.Builder
	for i, p := range pins {
		if i == 0 {
			b.WriteString(", pinned")
		} else {
			b.WriteString(",")
		}
		fprintf(&b, " by %s", clean(p.GetOwner()))
		if p.GetReason() != "" {
			fprintf(&b, " (%s)", clean(p.GetReason()))
		}
		until := "it is removed"
		if p.GetExpireTime() != nil {
			until = formatTime(p.GetExpireTime())
		}
		fprintf(&b, " until %s", until)
	}
	return b.String()
}

// printPhrases prints one phrase as a sentence, several as a list.
func printPhrases(w io.Writer, begin string, phrases []string) {
	if len(phrases) == 1 {
		fprintf(w, "%s %s.\n", begin, phrases[0])
		return
	}
	for i, p := range phrases {
		if i == 0 {
			fprintf(w, "%s\n", begin)
		}
		fprintf(w, "  - %s\n", p)
	}
}

// explainRelease explains when a dropped unit can be deleted.
func explainRelease(w io.Writer, u *snapshotdv1.UnitReferences) {
	var drops []string
	pinned, creating := false, false
	for _, h := range u.GetHolders() {
		if s := h.GetSnapshot(); s != nil {
			drops = append(drops, shellQuote(fmt.Sprintf("#%d", s.GetSnapshotId()), ""))
			pinned = pinned || len(s.GetPins()) > 0
		}
		creating = creating || h.GetCreating() != nil
	}
	switch {
	case len(drops) == 1 && u.GetHolderCount() == 1:
		fprintf(w, "It can be deleted after that snapshot is dropped: snapshotctl snapshot drop %s\n", drops[0])
	case len(drops) > 0:
		fprintf(w, "It can be deleted when nothing holds it any more. To drop the snapshots:\n")
		for _, d := range drops {
			fprintf(w, "  snapshotctl snapshot drop %s\n", d)
		}
	case creating:
		fprintf(
			w, "It can be deleted if no snapshot that is being created holds it in the end; retry when they are complete.\n",
		)
	default:
		fprintf(w, "It can be deleted when nothing holds it any more.\n")
	}
	if pinned {
		fprintf(w, "A pinned snapshot cannot be dropped until its pins expire or are removed; see `snapshotctl pin list`.\n")
	}
}

// unitArgs formats a unit as flags of `reclaim`.
func unitArgs(u *snapshotdv1.Unit) string {
	switch u.GetUnit().(type) {
	case *snapshotdv1.Unit_SegmentId:
		return fmt.Sprintf("--segment %d", u.GetSegmentId())
	case *snapshotdv1.Unit_IndexBuildId:
		return fmt.Sprintf("--build %d", u.GetIndexBuildId())
	}
	flags := "--path " + shellQuote(u.GetFile().GetPath(), "")
	if root := u.GetFile().GetRoot(); root != 0 {
		flags += fmt.Sprintf(" --root %d", root)
	}
	return flags
}
