package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

func (a *app) gcCommand() *cobra.Command {
	cmd := group("gc", "Deletes what nothing needs any more, and says why something stays", `Deletes what nothing needs any more, and says why something stays. The leader
does the same by itself, in rounds and sweeps. With collector: off it makes none of
these; it still removes snapshots that were dropped or expired.

What goes: segments, index builds and files that were dropped longer ago than
the tolerance and that no snapshot holds; what is left of dropped collections,
partitions and indexes; snapshots that expired; and objects under snapshotd's
own prefixes that nothing knows. Files of an engine that nothing knows are shown
by `+"`gc orphans`"+`, and go only when it is told to delete them.`)
	cmd.Example = `  snapshotctl gc run --dry-run
  snapshotctl gc status
  snapshotctl gc orphans --collection docs`
	cmd.AddCommand(a.gcRun(), a.gcStatus(), a.gcExplain(), a.gcOrphans())
	return cmd
}

// receive hands on the messages of a stream until it ends.
func receive[M any](stream interface{ Recv() (*M, error) }, each func(*M) error) error {
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := each(msg); err != nil {
			return err
		}
	}
}

func (a *app) gcRun() *cobra.Command {
	var (
		req         snapshotdv1.CollectRequest
		tolerance   span
		withObjects bool
	)
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Makes a round of the collector now",
		Long: `Makes a round of the collector now, and says what it came to. With --dry-run it
changes nothing, and tells of each thing what would become of it, and why:
  delete  it would go
  keep    something holds it
  wait    it was dropped too recently; see --tolerance
  stop    the round would delete too much of the collection: told of that, and
          of each unit that would go with --force
With --objects it names each object that would go below the thing that it is
part of, and so why.

A round stops in a collection of which it would delete more than the configured
share, and no fewer than 100 units: so much was rarely meant to go. The exit code
is then 5, and nothing of that collection is deleted until --force says that it
was. ` + "`gc status`" + ` tells the share.

With --sweep it also deletes what nothing knows under snapshotd's own prefixes
and is older than orphan_grace, as the leader does now and then. See what that is
with ` + "`gc orphans`" + `.

With -o json and yaml it prints what the server says, one message a line.`,
		Example: `  snapshotctl gc run --dry-run
  snapshotctl gc run --collection docs --dry-run --objects
  snapshotctl gc run --collection docs --tolerance 0s --wait`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	collection := addOptionalCollection(cmd, "only in this `collection`; of one that was dropped, '#ID'")
	f.BoolVar(&req.DryRun, "dry-run", false, "change nothing, and tell what would be done")
	f.BoolVar(&withObjects, "objects", false, "with --dry-run, name each object that would go")
	f.Var(&tolerance, "tolerance", "take what was dropped longer ago than this `time` span, such as 36h or 7d (default as configured)")
	f.BoolVar(&req.Force, "force", false, "go on where a round of 100 units or more stops at the configured share of a collection; needs --collection")
	f.BoolVar(&req.Sweep, "sweep", false, "also delete what nothing knows under snapshotd's own prefixes")
	f.BoolVar(&req.Wait, "wait", false, "return when the files are deleted, up to --timeout")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.optionalRef(collection)
		switch {
		case err != nil:
			return err
		case req.GetForce() && ref == nil:
			return usageErrorf("--force needs --collection: only for one collection at a time is it said that so much shall go")
		case withObjects && !req.GetDryRun():
			return usageErrorf("--objects needs --dry-run; what a round has granted is in `snapshotctl reclaim list --files`")
		case req.GetWait() && req.GetDryRun():
			return usageErrorf("--wait and --dry-run exclude each other: a dry run deletes nothing that could be waited for")
		case req.GetSweep() && ref != nil:
			return usageErrorf("--sweep and --collection exclude each other: a sweep is about snapshotd's own prefixes, in all stores")
		case tolerance.duration < 0:
			return usageErrorf("--tolerance %s: it must not be negative", clean(tolerance.text))
		case tolerance.duration > maxSpan:
			return usageErrorf("--tolerance %s: at most ten years, 3650d", clean(tolerance.text))
		}
		req.Collection = ref
		if f.Changed("tolerance") {
			req.Tolerance = durationpb.New(tolerance.duration)
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		limited, cancel := a.withTimeout(ctx, 0)
		defer cancel()
		stream, err := c.Collector.Collect(limited, &req)
		if err != nil {
			return err
		}
		var (
			rows *table
			sum  *snapshotdv1.CollectSummary
		)
		err = receive(stream, func(msg *snapshotdv1.CollectResponse) error {
			if msg.GetSummary() != nil {
				sum = msg.GetSummary()
			}
			if a.output != formatTable {
				return a.printLine(msg)
			}
			if !req.GetDryRun() || len(msg.GetItems()) == 0 {
				return nil
			}
			if rows == nil {
				// As wide as the longest kind, for rows are shown as they come.
				rows = newTable(a.out, "", "ACTION", "KIND       ", "ID", "COLLECTION", "FILES", "BYTES", "REASON")
			}
			return collectRows(rows, msg.GetItems(), withObjects)
		})
		if err != nil {
			return err
		}
		if sum == nil {
			return errors.New("the server ended the round without saying what it came to; see `snapshotctl gc status`")
		}
		if a.output == formatTable {
			fprintf(a.out, "%s", cycleText(sum, &req))
			a.printStops(ctx, c, sum, &req)
		}
		switch {
		case sum.GetError() != "":
			return fmt.Errorf("the round met trouble: %s", sum.GetError())
		case sum.GetStopCount() > 0:
			return status.Errorf(codes.FailedPrecondition, "%s in %s", map[bool]string{false: "the round stopped", true: "the round would stop"}[req.GetDryRun()],
				count(sum.GetStopCount(), "collection"))
		}
		return nil
	})
	return cmd
}

// collectRows shows items, with objects the objects of each below it.
func collectRows(t *table, items []*snapshotdv1.CollectItem, objects bool) error {
	for _, i := range items {
		id := strconv.FormatInt(i.GetId(), 10)
		if i.GetName() != "" {
			id += " (" + i.GetName() + ")"
		}
		files, bytes := "", "" // of what stays they need not be known
		if i.GetFiles() > 0 || i.GetAction() == snapshotdv1.CollectItem_ACTION_DELETE {
			files, bytes = strconv.FormatInt(i.GetFiles(), 10), size(i.GetBytes())
		}
		t.row(enumName(i.GetAction(), "ACTION_"), enumName(i.GetKind(), "KIND_"), id, fmt.Sprintf("#%d", i.GetCollectionId()), files, bytes, i.GetReason())
		if !objects || len(i.GetObjects()) == 0 {
			continue
		}
		if err := t.flush(); err != nil {
			return err
		}
		for _, o := range i.GetObjects() {
			if _, err := fmt.Fprintf(t.out, "    %s  %s  %s\n", clean(o.GetStore()), clean(o.GetKey()), size(o.GetSize())); err != nil {
				return err
			}
		}
	}
	return t.flush()
}

// filesText says how many files there are and of what size.
func filesText(files, bytes int64) string {
	return fmt.Sprintf("%s, %s", count(files, "file"), size(bytes))
}

// roundText says what a round came to.
func cycleText(sum *snapshotdv1.CollectSummary, req *snapshotdv1.CollectRequest) string {
	var b strings.Builder
	of := fmt.Sprintf("%s: %s", count(sum.GetGranted(), "unit"), filesText(sum.GetFiles(), sum.GetBytes()))
	switch {
	case sum.GetGranted() == 0 && sum.GetStopCount()+sum.GetRemoved() > 0: // which is told below
	case sum.GetGranted() == 0:
		fprintf(&b, "no unit can go\n")
	case req.GetDryRun():
		fprintf(&b, "would delete %s\n", of)
	case req.GetWait():
		fprintf(&b, "deleted %s\n", of)
	default:
		fprintf(&b, "snapshotd deletes %s\n", of)
	}
	if sum.GetWaiting() > 0 {
		fprintf(&b, "waiting: %s, dropped too recently\n", count(sum.GetWaiting(), "unit"))
	}
	if sum.GetHeld() > 0 {
		fprintf(&b, "held: %s%s\n", count(sum.GetHeld(), "unit"), parkedText(sum.GetParked()))
	}
	if sum.GetRemoved() > 0 {
		gone := "gone for good"
		if req.GetDryRun() {
			gone = "would be gone for good"
		}
		fprintf(&b, "%s: %s\n", gone, removedText(sum.GetRemoved()))
	}
	if req.GetSweep() {
		swept := "swept"
		if req.GetDryRun() {
			swept = "would sweep"
		}
		fprintf(&b, "%s: %s, %s, of snapshotd's own that nothing knows\n", swept, count(sum.GetSwept(), "object"), size(sum.GetSweptBytes()))
	}
	return b.String()
}

func parkedText(n int64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(", the records of %d in the object store", n)
}

// removedText names the things of which nothing is left, which the server counts
// together.
func removedText(n int64) string {
	if n == 1 {
		return "1 collection, partition or index"
	}
	return fmt.Sprintf("%d collections, partitions and indexes", n)
}

// maxSpan is the longest time span that the collector's calls take.
const maxSpan = 10 * 365 * day

// stops tells in which collections a round stopped, and the way on.
func (a *app) printStops(ctx context.Context, c *client.Client, sum *snapshotdv1.CollectSummary, req *snapshotdv1.CollectRequest) {
	if len(sum.GetStops()) == 0 {
		return
	}
	share := "the configured share"
	if resp, err := unary(ctx, a, c.Collector.GetCollectorStatus, &snapshotdv1.GetCollectorStatusRequest{}); err == nil { // else it is said without
		share = shareText(resp.GetMaxShare())
	}
	stopped, tolerance := "stopped", ""
	if req.GetDryRun() {
		stopped = "would stop"
	}
	if req.GetTolerance() != nil { // with another the same command may find nothing
		tolerance = " --tolerance " + req.GetTolerance().AsDuration().String()
	}
	for _, s := range sum.GetStops() {
		as, named := a.stopCollection(ctx, c, s)
		way := fmt.Sprintf("snapshotctl gc run --collection %s%s", shellQuote(as, ""), tolerance)
		look := fmt.Sprintf("look with `%s --dry-run`, and if so much shall go, run it with --force instead", way)
		if req.GetDryRun() {
			look = fmt.Sprintf("if so much shall go: `%s --force`", way)
		}
		fprintf(a.out, "%s in collection %s: %s would go, more than %s; %s\n", stopped, named, stopText(s), share, look)
	}
	if more := sum.GetStopCount() - int64(len(sum.GetStops())); more > 0 {
		fprintf(a.out, "%s in %s more\n", stopped, count(more, "collection"))
	}
}

// stopText says how much would go.
func stopText(s *snapshotdv1.CollectStop) string {
	return fmt.Sprintf("%d of %d units and segments", s.GetDue(), s.GetTotal())
}

// stopPlace returns the collection of a stop as commands take it, and for people.
func (a *app) stopCollection(ctx context.Context, c *client.Client, s *snapshotdv1.CollectStop) (as, named string) {
	as = fmt.Sprintf("#%d", s.GetCollectionId())
	resp, err := unary(ctx, a, c.Catalog.GetCollection, &snapshotdv1.GetCollectionRequest{Collection: idRef(s.GetCollectionId())})
	col := resp.GetCollection()
	if err != nil || col.GetName() == "" { // it goes by its id
		return as, as
	}
	as = strings.TrimPrefix(fullName(col.GetDb(), col.GetName(), col.GetId()), "default/")
	return as, fmt.Sprintf("%s (%d)", clean(as), col.GetId())
}

// shareText writes a share of one for people, to a tenth of a percent.
func shareText(share float64) string {
	return strconv.FormatFloat(math.Round(share*1000)/10, 'f', -1, 64) + "%"
}

func (a *app) gcStatus() *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Shows what the leader's last round came to, and what is left to do",
		Example: "  snapshotctl gc status",
		Args:    exactArgs(),
		RunE: a.run(func(ctx context.Context, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := unary(ctx, a, c.Collector.GetCollectorStatus, &snapshotdv1.GetCollectorStatusRequest{})
			if err != nil {
				return err
			}
			return a.print(resp, func(w io.Writer) {
				renderCollector(w, resp, func(s *snapshotdv1.CollectStop) (string, string) { return a.stopCollection(ctx, c, s) })
			})
		}),
	}
}

// renderCollector shows how the collector is doing. place names the collection of
// a stop.
func renderCollector(w io.Writer, r *snapshotdv1.GetCollectorStatusResponse, place func(*snapshotdv1.CollectStop) (as, named string)) {
	enabled, blocked := "on", "no"
	if !r.GetEnabled() {
		enabled = "off: makes no rounds and no sweeps; dropped and expired snapshots are still removed"
	}
	at := shareText(r.GetMaxShare()) + " of a collection"
	if r.GetStopUnits() > 0 {
		at += fmt.Sprintf(", from %s on", count(r.GetStopUnits(), "unit"))
	}
	switch {
	case r.GetBlocked() != "":
		blocked = r.GetBlocked()
	case r.GetClockStopped() != "":
		blocked = r.GetClockStopped()
	}
	keyValues(w, "",
		"collector", enabled,
		"blocked", blocked,
		"tolerance", r.GetTolerance().AsDuration(),
		"stops at", at,
		"deleting", count(r.GetDeleting(), "unit"),
		"not confirmed by callers", count(r.GetUnconfirmed(), "unit"),
	)
	renderHalts(w, r.GetHalts())
	sum := r.GetLastRound()
	if sum == nil {
		fprintf(w, "There was no round yet.\n")
		return
	}
	took := sum.GetEndTime().AsTime().Sub(sum.GetStartTime().AsTime())
	stops, first := "nowhere", ""
	if sum.GetStopCount() > 0 {
		var in []string
		for _, s := range sum.GetStops()[:min(len(sum.GetStops()), maxPlaces)] {
			as, named := place(s)
			if first == "" {
				first = as
			}
			in = append(in, named+": "+stopText(s))
		}
		if more := sum.GetStopCount() - int64(len(in)); more > 0 {
			in = append(in, fmt.Sprintf("%d more", more))
		}
		stops = strings.Join(in, "; ")
	}
	trouble := sum.GetError()
	switch {
	case trouble == "" && len(r.GetHalts()) > 0:
		trouble = "see what stands still, above"
	case trouble == "":
		trouble = "none"
	}
	fprintf(w, "Last round\n")
	keyValues(w, "  ",
		"by", sum.GetReplica(),
		"began", sum.GetStartTime(),
		"took", took.Round(time.Millisecond),
		"granted", fmt.Sprintf("%s: %s", count(sum.GetGranted(), "unit"), filesText(sum.GetFiles(), sum.GetBytes())),
		"waiting", count(sum.GetWaiting(), "unit"),
		"held", count(sum.GetHeld(), "unit")+parkedText(sum.GetParked()),
		"gone for good", removedText(sum.GetRemoved()),
		"stopped in", stops,
		"trouble", trouble,
	)
	if first != "" {
		fprintf(w, "Look with `snapshotctl gc run --collection %s --dry-run`; if so much shall go, run it with --force instead.\n", shellQuote(first, ""))
	}
}

// renderHalts shows what of expiry, removal and collection stands still.
func renderHalts(w io.Writer, halts []*snapshotdv1.CollectorHalt) {
	if len(halts) == 0 {
		return
	}
	fprintf(w, "Stands still\n")
	for _, h := range halts {
		text := h.GetError()
		if h.GetSinceTime() != nil {
			text += "; since " + h.GetSinceTime().AsTime().Format(time.RFC3339)
		}
		if h.GetFailures() > 0 {
			text += fmt.Sprintf(", %s", count(h.GetFailures(), "failure"))
		}
		if h.GetReplica() != "" {
			text += ", in replica " + h.GetReplica()
		}
		keyValues(w, "  ", h.GetWhat(), text)
	}
}

// maxPlaces is how many stops the status names: each costs a call.
const maxPlaces = 8

func (a *app) gcExplain() *cobra.Command {
	req := snapshotdv1.ExplainObjectRequest{}
	cmd := &cobra.Command{
		Use:   "explain KEY",
		Short: "Says what an object belongs to, and whether and why it stays",
		Long: `Says what an object of an object store belongs to, and whether and why it stays.
KEY is the object's whole key in the store. The object need not be there.
` + "`snapshotctl explain`" + ` says more about a segment, an index build or a file of a collection.`,
		Example: `  snapshotctl gc explain snapshots/7/42/metadata.json
  snapshotctl gc explain engine/7/8/101/insert/100/1 --store archive`,
		Args: exactArgs("KEY"),
	}
	cmd.Flags().StringVar(&req.Store, "store", "", "`alias` of the store (default the one for snapshots)")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		if req.Key = args[0]; req.GetKey() == "" {
			return usageErrorf("KEY is empty: which object?")
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Collector.ExplainObject, &req)
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) { renderObject(w, req.GetKey(), resp) })
	})
	return cmd
}

func renderObject(w io.Writer, key string, r *snapshotdv1.ExplainObjectResponse) {
	what := r.GetWhat()
	if what == "" {
		what = "not known"
	}
	fprintf(w, "%s: %s\n", clean(key), clean(what))
	unnamed := slices.DeleteFunc(slices.Clone(r.GetHolders()), func(h *snapshotdv1.Holder) bool { // of those that the reason names
		return h.GetSnapshot() != nil && strings.Contains(r.GetReason(), strconv.Quote(h.GetSnapshot().GetName()))
	})
	printPhrases(w, "It is", explainHolders(&snapshotdv1.UnitReferences{Holders: unnamed, HolderCount: int64(len(unnamed))}))
	switch reason := clean(r.GetReason()); {
	case !r.GetExists():
		fprintf(w, "%s\n", reason)
	case r.GetKept():
		fprintf(w, "It stays: %s\n", reason)
	default:
		fprintf(w, "It may go: %s\n", reason)
	}
	switch {
	case r.GetCollectionId() == 0:
	case r.GetIndexBuildId() != 0:
		fprintf(w, "More: snapshotctl explain --collection '#%d' --build %d\n", r.GetCollectionId(), r.GetIndexBuildId())
	case r.GetSegmentId() != 0:
		fprintf(w, "More: snapshotctl explain --collection '#%d' %d\n", r.GetCollectionId(), r.GetSegmentId())
	}
}

func (a *app) gcOrphans() *cobra.Command {
	var (
		remove bool
		grace  span
	)
	cmd := &cobra.Command{
		Use:   "orphans",
		Short: "Lists objects that nothing knows, and deletes them when told to",
		Long: `Lists the objects that nothing knows: under snapshotd's own prefixes, where the
collector deletes them by itself when they are old enough, or with --collection
under the roots of a collection. It reads the listing of the stores, and takes as
long as that does.

With --delete those under the roots of a collection go that are deletable and
older than --grace by the store's clock, and are listed. An engine writes files
before it registers them, and until then they are orphans: --grace must be
longer than that ever takes. Deletable is what lies where segments of that
collection lie, under ids that were handed out and have no record. Files that
another program has put into such a place look the same, so look at the list
first. Once a collection is dropped and gone nobody lists its orphans.

DELETABLE is "not yet" for what is younger than the configured orphan_grace.

With -o json and yaml it prints what the server says, one message a line.`,
		Example: `  snapshotctl gc orphans
  snapshotctl gc orphans --collection docs
  snapshotctl gc orphans --collection docs --delete --grace 24h`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	collection := addOptionalCollection(cmd, "under the roots of this `collection` (default under snapshotd's own prefixes)")
	f.BoolVar(&remove, "delete", false, "delete those that are deletable; needs --collection and --grace")
	f.Var(&grace, "grace", "with --delete, how old an object must be: a `time` span of at least 1h, such as 36h or 7d")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.optionalRef(collection)
		switch {
		case err != nil:
			return err
		case remove && ref == nil:
			return usageErrorf("--delete needs --collection: under snapshotd's own prefixes the collector deletes by itself, and an engine's files go for one collection at a time")
		case remove && !f.Changed("grace"):
			return usageErrorf("--delete needs --grace: a file that is written and not registered yet is an orphan, too; give a time span, such as 24h, that is longer than a file ever stays so")
		case !remove && f.Changed("grace"):
			return usageErrorf("--grace is for --delete; without it orphans of any age are listed")
		case remove && grace.duration < time.Hour:
			return usageErrorf("--grace %s: at least 1h, for files are written before they are registered", clean(grace.text))
		case remove && grace.duration > maxSpan:
			return usageErrorf("--grace %s: at most ten years, 3650d", clean(grace.text))
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		ctx, cancel := a.withTimeout(ctx, 0)
		defer cancel()
		o := orphans{app: a, table: newTable(a.out, "", "STORE", "KEY", "SIZE", "AGE", "DELETABLE", "REASON")}
		if remove {
			stream, err := c.Collector.DeleteOrphans(ctx, &snapshotdv1.DeleteOrphansRequest{Collection: ref, Grace: durationpb.New(grace.duration)})
			if err != nil {
				return err
			}
			err = receive(stream, func(msg *snapshotdv1.DeleteOrphansResponse) error {
				if a.output != formatTable {
					return a.printLine(msg)
				}
				return o.show(msg.GetDeleted())
			})
			return o.end(err, "deleted: %s\n", count(o.n, "object")+", "+size(o.bytes))
		}
		stream, err := c.Collector.ListOrphans(ctx, &snapshotdv1.ListOrphansRequest{Collection: ref})
		if err != nil {
			return err
		}
		err = receive(stream, func(msg *snapshotdv1.ListOrphansResponse) error {
			if a.output != formatTable {
				return a.printLine(msg)
			}
			return o.show(msg.GetOrphans())
		})
		return o.end(err, "%s; deletable: %s\n", count(o.n, "orphan")+", "+size(o.bytes), fmt.Sprintf("%d, %s", o.deletable, size(o.deletableBytes)))
	})
	return cmd
}

// orphans shows orphans as they come, and counts them.
type orphans struct {
	app                   *app
	table                 *table
	n, deletable          int64
	bytes, deletableBytes int64
}

func (o *orphans) show(list []*snapshotdv1.Orphan) error {
	for _, x := range list {
		o.n, o.bytes = o.n+1, o.bytes+x.GetSize()
		deletable := "no"
		switch {
		case x.GetYoung():
			deletable = "not yet"
		case x.GetDeletable():
			o.deletable, o.deletableBytes = o.deletable+1, o.deletableBytes+x.GetSize()
			deletable = "yes"
		}
		o.table.row(x.GetStore(), x.GetKey(), size(x.GetSize()), x.GetAge().AsDuration().Round(time.Second), deletable, x.GetReason())
	}
	return o.table.flush()
}

// end ends a list with a sentence. After an error the sentence is about what came
// before.
func (o *orphans) end(err error, format string, args ...any) error {
	if o.app.output == formatTable && (err == nil || o.n > 0) {
		if flushErr := o.table.flush(); flushErr != nil && err == nil {
			err = flushErr
		}
		fprintf(o.app.out, format, args...)
	}
	return err
}
