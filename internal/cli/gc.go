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
	cmd := group("gc", "Runs the collector and explains its decisions",
		`Runs the collector and explains its decisions. The leader runs it by itself, in
cycles and sweeps. With collector: off it runs neither; it still removes dropped and
expired snapshots.

The collector deletes segments, index builds and files that were dropped longer ago
than the tolerance and that no snapshot holds; the rest of dropped collections,
partitions and indexes; expired snapshots; and orphans, objects without a record,
under snapshotd's own prefixes. Orphans among an engine's files are listed by
`+"`gc orphans`"+`, which deletes them only on request.`)
	cmd.Example = `  snapshotctl gc run --dry-run
  snapshotctl gc status
  snapshotctl gc orphans --collection docs`
	cmd.AddCommand(a.gcRun(), a.gcStatus(), a.gcExplain(), a.gcOrphans())
	return cmd
}

// receive calls each with every message of a stream until its end.
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
		Short: "Runs a collector cycle now",
		Long: `Runs a collector cycle now and prints its result. With --dry-run it changes nothing
and prints the plan, with an action and a reason for each item:
  delete  it would be deleted
  keep    something holds it
  wait    it was dropped too recently; see --tolerance
  stop    the cycle would delete too much of the collection; also printed for
          each unit that --force would delete
With --objects it lists under each item the objects that would be deleted.

A cycle stops in a collection of which it would delete more than the configured
share and at least 100 units, as a protection against mistakes. The exit code is
then 5, and nothing of that collection is deleted without --force.
` + "`gc status`" + ` shows the share.

With --sweep it also deletes orphans under snapshotd's own prefixes that are older
than orphan_grace, as the leader does regularly. ` + "`gc orphans`" + ` lists them.

With -o json and yaml it prints the server's messages, one per line.`,
		Example: `  snapshotctl gc run --dry-run
  snapshotctl gc run --collection docs --dry-run --objects
  snapshotctl gc run --collection docs --tolerance 0s --wait`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	collection := addOptionalCollection(cmd, "only this `collection`; '#ID' if it was dropped")
	f.BoolVar(&req.DryRun, "dry-run", false, "change nothing and print the plan")
	f.BoolVar(&withObjects, "objects", false, "with --dry-run, list each object that would be deleted")
	f.Var(
		&tolerance, "tolerance",
		"collect units dropped longer ago than this `time` span, such as 36h or 7d (default as configured)",
	)
	f.BoolVar(&req.Force, "force", false, "delete more than the configured share of the collection; needs --collection")
	f.BoolVar(&req.Sweep, "sweep", false, "also delete orphans under snapshotd's own prefixes")
	f.BoolVar(&req.Wait, "wait", false, "return when the files are deleted, up to --timeout")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		var err error
		if req.Collection, err = a.optionalRef(collection); err != nil {
			return err
		}
		if withObjects && !req.GetDryRun() {
			return usageErrorf("--objects requires --dry-run; " +
				"`snapshotctl reclaim list --files` lists the objects that a cycle has granted")
		}
		if f.Changed("tolerance") {
			if err := checkTolerance(tolerance); err != nil {
				return err
			}
			req.Tolerance = durationpb.New(tolerance.duration)
		}
		if err := checkCollect(&req); err != nil {
			return err
		}
		return a.collect(ctx, &req, withObjects)
	})
	return cmd
}

func checkTolerance(tolerance span) error {
	switch {
	case tolerance.duration < 0:
		return usageErrorf("--tolerance %s: it must not be negative", clean(tolerance.text))
	case tolerance.duration > maxSpan:
		return usageErrorf("--tolerance %s: at most ten years, 3650d", clean(tolerance.text))
	}
	return nil
}

// checkCollect rejects flags of gc run that exclude each other.
func checkCollect(req *snapshotdv1.CollectRequest) error {
	switch {
	case req.GetForce() && req.GetCollection() == nil:
		return usageErrorf("--force requires --collection")
	case req.GetWait() && req.GetDryRun():
		return usageErrorf("--wait and --dry-run exclude each other")
	case req.GetSweep() && req.GetCollection() != nil:
		return usageErrorf("--sweep and --collection exclude each other: " +
			"a sweep covers snapshotd's own prefixes in all stores")
	}
	return nil
}

// collect runs a cycle and prints its items and its result.
func (a *app) collect(ctx context.Context, req *snapshotdv1.CollectRequest, withObjects bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	limited, cancel := a.withTimeout(ctx, 0)
	defer cancel()
	stream, err := c.Collector.Collect(limited, req)
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
			// As wide as the longest kind: rows are printed as they arrive.
			rows = newTable(a.out, "", "ACTION", "KIND       ", "ID", "COLLECTION", "FILES", "BYTES", "REASON")
		}
		return collectRows(rows, msg.GetItems(), withObjects)
	})
	if err != nil {
		return err
	}
	if sum == nil {
		return errors.New("the server ended the cycle without a summary; see `snapshotctl gc status`")
	}
	if a.output == formatTable {
		fprintf(a.out, "%s", cycleText(sum, req))
		a.printStops(ctx, c, sum, req)
	}
	switch {
	case sum.GetError() != "":
		return fmt.Errorf("the cycle failed in part: %s", sum.GetError())
	case sum.GetStopCount() > 0:
		stopped := "the cycle stopped"
		if req.GetDryRun() {
			stopped = "the cycle would stop"
		}
		return status.Errorf(codes.FailedPrecondition, "%s in %s", stopped, count(sum.GetStopCount(), "collection"))
	}
	return nil
}

// collectRows prints items, each followed by its objects if objects is set.
func collectRows(t *table, items []*snapshotdv1.CollectItem, objects bool) error {
	for _, i := range items {
		id := strconv.FormatInt(i.GetId(), 10)
		if i.GetName() != "" {
			id += " (" + i.GetName() + ")"
		}
		files, bytes := "", "" // may be unknown for an item that stays
		if i.GetFiles() > 0 || i.GetAction() == snapshotdv1.CollectItem_ACTION_DELETE {
			files, bytes = strconv.FormatInt(i.GetFiles(), 10), size(i.GetBytes())
		}
		t.row(
			enumName(i.GetAction(), "ACTION_"), enumName(i.GetKind(), "KIND_"), id, fmt.Sprintf("#%d", i.GetCollectionId()),
			files, bytes, i.GetReason(),
		)
		if !objects || len(i.GetObjects()) == 0 {
			continue
		}
		if err := t.flush(); err != nil {
			return err
		}
		for _, o := range i.GetObjects() {
			_, err := fmt.Fprintf(t.out, "    %s  %s  %s\n", clean(o.GetStore()), clean(o.GetKey()), size(o.GetSize()))
			if err != nil {
				return err
			}
		}
	}
	return t.flush()
}

// filesText formats a number of files and their size.
func filesText(files, bytes int64) string {
	return fmt.Sprintf("%s, %s", count(files, "file"), size(bytes))
}

// cycleText formats the result of a cycle.
func cycleText(sum *snapshotdv1.CollectSummary, req *snapshotdv1.CollectRequest) string {
	var b strings.Builder
	granted := fmt.Sprintf("%s: %s", count(sum.GetGranted(), "unit"), filesText(sum.GetFiles(), sum.GetBytes()))
	switch {
	case sum.GetGranted() == 0 && sum.GetStopCount()+sum.GetRemoved() > 0: // see the lines below
	case sum.GetGranted() == 0:
		fprintf(&b, "no unit can be deleted\n")
	case req.GetDryRun():
		fprintf(&b, "would delete %s\n", granted)
	case req.GetWait():
		fprintf(&b, "deleted %s\n", granted)
	default:
		fprintf(&b, "snapshotd deletes %s\n", granted)
	}
	if sum.GetWaiting() > 0 {
		fprintf(&b, "waiting: %s, dropped too recently\n", count(sum.GetWaiting(), "unit"))
	}
	if sum.GetHeld() > 0 {
		fprintf(&b, "held: %s%s\n", count(sum.GetHeld(), "unit"), spilledText(sum.GetParked()))
	}
	if sum.GetRemoved() > 0 {
		gone := "removed"
		if req.GetDryRun() {
			gone = "would remove"
		}
		fprintf(&b, "%s: %s\n", gone, removedText(sum.GetRemoved()))
	}
	if req.GetSweep() {
		swept := "swept"
		if req.GetDryRun() {
			swept = "would sweep"
		}
		fprintf(&b, "%s: %s, %s, orphans under snapshotd's own prefixes\n",
			swept, count(sum.GetSwept(), "object"), size(sum.GetSweptBytes()))
	}
	return b.String()
}

func spilledText(n int64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(", the records of %d in the object store", n)
}

// removedText formats the number of collections, partitions and indexes that a cycle
// removed. The server counts them together.
func removedText(n int64) string {
	if n == 1 {
		return "1 collection, partition or index"
	}
	return fmt.Sprintf("%d collections, partitions and indexes", n)
}

// maxSpan is the longest time span that the collector's calls take.
const maxSpan = 10 * 365 * day

// printStops prints the collections in which a cycle stopped, and how to continue.
func (a *app) printStops(
	ctx context.Context, c *client.Client, sum *snapshotdv1.CollectSummary, req *snapshotdv1.CollectRequest,
) {
	if len(sum.GetStops()) == 0 {
		return
	}
	share := "the configured share"
	resp, err := unary(ctx, a, c.Collector.GetCollectorStatus, &snapshotdv1.GetCollectorStatusRequest{})
	if err == nil { // optional
		share = shareText(resp.GetMaxShare())
	}
	stopped, tolerance := "stopped", ""
	if req.GetDryRun() {
		stopped = "would stop"
	}
	if req.GetTolerance() != nil { // without it the command may find nothing
		tolerance = " --tolerance " + req.GetTolerance().AsDuration().String()
	}
	for _, s := range sum.GetStops() {
		arg, label := a.stopCollection(ctx, c, s)
		command := fmt.Sprintf("snapshotctl gc run --collection %s%s", shellQuote(arg, ""), tolerance)
		next := fmt.Sprintf("see the plan with `%s --dry-run`; if it is intended, run with --force", command)
		if req.GetDryRun() {
			next = fmt.Sprintf("if this is intended: `%s --force`", command)
		}
		fprintf(a.out, "%s in collection %s: would delete %s, more than %s; %s\n", stopped, label, stopText(s), share, next)
	}
	if more := sum.GetStopCount() - int64(len(sum.GetStops())); more > 0 {
		fprintf(a.out, "%s in %s more\n", stopped, count(more, "collection"))
	}
}

// stopText formats how much a stopped cycle would delete.
func stopText(s *snapshotdv1.CollectStop) string {
	return fmt.Sprintf("%d of %d units and segments", s.GetDue(), s.GetTotal())
}

// stopCollection returns the collection of a stop as an argument and as a label.
func (a *app) stopCollection(ctx context.Context, c *client.Client, s *snapshotdv1.CollectStop) (arg, label string) {
	arg = fmt.Sprintf("#%d", s.GetCollectionId())
	req := &snapshotdv1.GetCollectionRequest{Collection: idRef(s.GetCollectionId())}
	resp, err := unary(ctx, a, c.Catalog.GetCollection, req)
	col := resp.GetCollection()
	if err != nil || col.GetName() == "" { // use the id
		return arg, arg
	}
	arg = strings.TrimPrefix(fullName(col.GetDb(), col.GetName(), col.GetId()), "default/")
	return arg, fmt.Sprintf("%s (%d)", clean(arg), col.GetId())
}

// shareText formats a fraction as a percentage with one decimal.
func shareText(share float64) string {
	return strconv.FormatFloat(math.Round(share*1000)/10, 'f', -1, 64) + "%"
}

func (a *app) gcStatus() *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Shows the leader's last cycle and the remaining work",
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

// renderCollector prints the state of the collector. place returns the collection of
// a stop as an argument and as a label.
func renderCollector(
	w io.Writer, r *snapshotdv1.GetCollectorStatusResponse, place func(*snapshotdv1.CollectStop) (arg, label string),
) {
	enabled, blocked := "on", "no"
	if !r.GetEnabled() {
		enabled = "off: runs no cycles and no sweeps; dropped and expired snapshots are still removed"
	}
	at := shareText(r.GetMaxShare()) + " of a collection"
	if r.GetStopUnits() > 0 {
		at += fmt.Sprintf(", at least %s", count(r.GetStopUnits(), "unit"))
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
		fprintf(w, "No cycle has run yet.\n")
		return
	}
	took := sum.GetEndTime().AsTime().Sub(sum.GetStartTime().AsTime())
	stops, first := "nowhere", ""
	if sum.GetStopCount() > 0 {
		var in []string
		for _, s := range sum.GetStops()[:min(len(sum.GetStops()), maxPlaces)] {
			arg, label := place(s)
			if first == "" {
				first = arg
			}
			in = append(in, label+": "+stopText(s))
		}
		if more := sum.GetStopCount() - int64(len(in)); more > 0 {
			in = append(in, fmt.Sprintf("%d more", more))
		}
		stops = strings.Join(in, "; ")
	}
	failure := sum.GetError()
	switch {
	case failure == "" && len(r.GetHalts()) > 0:
		failure = "see Halted, above"
	case failure == "":
		failure = "none"
	}
	fprintf(w, "Last cycle\n")
	keyValues(w, "  ",
		"replica", sum.GetReplica(),
		"started", sum.GetStartTime(),
		"took", took.Round(time.Millisecond),
		"granted", fmt.Sprintf("%s: %s", count(sum.GetGranted(), "unit"), filesText(sum.GetFiles(), sum.GetBytes())),
		"waiting", count(sum.GetWaiting(), "unit"),
		"held", count(sum.GetHeld(), "unit")+spilledText(sum.GetParked()),
		"removed", removedText(sum.GetRemoved()),
		"stopped in", stops,
		"error", failure,
	)
	if first != "" {
		fprintf(
			w, "See the plan with `snapshotctl gc run --collection %s --dry-run`; if it is intended, run with --force.\n",
			shellQuote(first, ""),
		)
	}
}

// renderHalts prints the parts of expiry, removal and collection that are halted.
func renderHalts(w io.Writer, halts []*snapshotdv1.CollectorHalt) {
	if len(halts) == 0 {
		return
	}
	fprintf(w, "Halted\n")
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

// maxPlaces is the number of stops that the status names; each costs a call.
const maxPlaces = 8

func (a *app) gcExplain() *cobra.Command {
	req := snapshotdv1.ExplainObjectRequest{}
	cmd := &cobra.Command{
		Use:   "explain KEY",
		Short: "Explains what an object belongs to and why it stays or may go",
		Long: `Explains what an object of an object store belongs to, and why it stays or may be
deleted. KEY is the object's whole key in the store. The object need not exist.
` + "`snapshotctl explain`" + ` has more on a segment, an index build or a file of a collection.`,
		Example: `  snapshotctl gc explain snapshots/7/42/metadata.json
  snapshotctl gc explain engine/7/8/101/insert/100/1 --store archive`,
		Args: exactArgs("KEY"),
	}
	cmd.Flags().StringVar(&req.Store, "store", "", "`alias` of the store (default the one for snapshots)")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		if req.Key = args[0]; req.GetKey() == "" {
			return usageErrorf("KEY is empty")
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
		what = "unknown"
	}
	fprintf(w, "%s: %s\n", clean(key), clean(what))
	unnamed := slices.DeleteFunc(slices.Clone(r.GetHolders()), func(h *snapshotdv1.Holder) bool {
		return h.GetSnapshot() != nil && strings.Contains(r.GetReason(), strconv.Quote(h.GetSnapshot().GetName()))
	})
	printPhrases(w, "It is", explainHolders(&snapshotdv1.UnitReferences{
		Holders: unnamed, HolderCount: int64(len(unnamed)),
	}))
	switch reason := clean(r.GetReason()); {
	case !r.GetExists():
		fprintf(w, "%s\n", reason)
	case r.GetKept():
		fprintf(w, "It stays: %s\n", reason)
	default:
		fprintf(w, "It may be deleted: %s\n", reason)
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
		Short: "Lists orphans and deletes them on request",
		Long: `Lists orphans, objects without a record: under snapshotd's own prefixes, where the
collector deletes them by itself when they are old enough, or with --collection
under the roots of a collection. It lists the stores, which may take long.

With --delete it deletes, and lists, the orphans under the roots of a collection that
are deletable and older than --grace by the store's clock. An engine writes files
before it registers them; until then they are orphans, so --grace must exceed the
time between the two. Deletable orphans are at the place of a segment of that
collection, under an allocated id without a record. Files that another program put
there look the same, so check the list first. When a dropped collection is removed,
its orphans are no longer listed.

DELETABLE is "not yet" for orphans younger than the configured orphan_grace.

With -o json and yaml it prints the server's messages, one per line.`,
		Example: `  snapshotctl gc orphans
  snapshotctl gc orphans --collection docs
  snapshotctl gc orphans --collection docs --delete --grace 24h`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	collection := addOptionalCollection(cmd, "under the roots of this `collection` (default: snapshotd's own prefixes)")
	f.BoolVar(&remove, "delete", false, "delete the deletable orphans; requires --collection and --grace")
	f.Var(&grace, "grace", "with --delete, the minimum age: a `time` span of at least 1h, such as 36h or 7d")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.optionalRef(collection)
		switch {
		case err != nil:
			return err
		case remove && ref == nil:
			return usageErrorf(
				"--delete requires --collection; under snapshotd's own prefixes the collector deletes orphans by itself",
			)
		case remove && !f.Changed("grace"):
			return usageErrorf("--delete requires --grace, such as 24h, longer than any file stays unregistered")
		case !remove && f.Changed("grace"):
			return usageErrorf("--grace requires --delete; without it orphans of any age are listed")
		case remove && grace.duration < time.Hour:
			return usageErrorf("--grace %s: at least 1h: files are written before they are registered", clean(grace.text))
		case remove && grace.duration > maxSpan:
			return usageErrorf("--grace %s: at most ten years, 3650d", clean(grace.text))
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		ctx, cancel := a.withTimeout(ctx, 0)
		defer cancel()
		if remove {
			req := &snapshotdv1.DeleteOrphansRequest{Collection: ref, Grace: durationpb.New(grace.duration)}
			return a.deleteOrphans(ctx, c, req)
		}
		return a.listOrphans(ctx, c, &snapshotdv1.ListOrphansRequest{Collection: ref})
	})
	return cmd
}

func (a *app) listOrphans(ctx context.Context, c *client.Client, req *snapshotdv1.ListOrphansRequest) error {
	stream, err := c.Collector.ListOrphans(ctx, req)
	if err != nil {
		return err
	}
	o := newOrphans(a)
	err = receive(stream, func(msg *snapshotdv1.ListOrphansResponse) error {
		if a.output != formatTable {
			return a.printLine(msg)
		}
		return o.show(msg.GetOrphans())
	})
	return o.end(err, "%s, %s; deletable: %d, %s\n",
		count(o.n, "orphan"), size(o.bytes), o.deletable, size(o.deletableBytes))
}

func (a *app) deleteOrphans(ctx context.Context, c *client.Client, req *snapshotdv1.DeleteOrphansRequest) error {
	stream, err := c.Collector.DeleteOrphans(ctx, req)
	if err != nil {
		return err
	}
	o := newOrphans(a)
	err = receive(stream, func(msg *snapshotdv1.DeleteOrphansResponse) error {
		if a.output != formatTable {
			return a.printLine(msg)
		}
		return o.show(msg.GetDeleted())
	})
	return o.end(err, "deleted: %s, %s\n", count(o.n, "object"), size(o.bytes))
}

// orphans prints orphans as they arrive and counts them.
type orphans struct {
	app                   *app
	table                 *table
	n, deletable          int64
	bytes, deletableBytes int64
}

func newOrphans(a *app) *orphans {
	return &orphans{app: a, table: newTable(a.out, "", "STORE", "KEY", "SIZE", "AGE", "DELETABLE", "REASON")}
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
		o.table.row(
			x.GetStore(), x.GetKey(), size(x.GetSize()), x.GetAge().AsDuration().Round(time.Second), deletable, x.GetReason(),
		)
	}
	return o.table.flush()
}

// end prints a summary after the list. After an error it covers the rows before.
func (o *orphans) end(err error, format string, args ...any) error {
	if o.app.output == formatTable && (err == nil || o.n > 0) {
		if flushErr := o.table.flush(); flushErr != nil && err == nil {
			err = flushErr
		}
		fprintf(o.app.out, format, args...)
	}
	return err
}
