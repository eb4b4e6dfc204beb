package cli

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/types/known/durationpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

func (a *app) restoreCommand() *cobra.Command {
	cmd := group("restore", "Restores snapshots",
		`Restores a snapshot as a new collection, in the background. The files are copied
within the object store; the collection appears when all of them are copied and
verified. A restore ends with the whole collection or with nothing.`)
	cmd.Example = `  snapshotctl restore plan nightly --to products_copy
  snapshotctl restore start nightly --to products_copy --wait
  snapshotctl restore list`
	cmd.AddCommand(
		a.restorePlan(), a.restoreStart(), a.restoreStatus(), a.restoreWatch(), a.restoreList(), a.restoreLimit(),
		a.restoreCancel(),
	)
	return cmd
}

// restoreFlags are the common flags of plan and start.
type restoreFlags struct {
	snapshot    *snapshotArg
	to          string
	partitions  []string
	channels    []string
	properties  []string
	labels      []string
	skipIndexes bool
	priority    int32
	timeout     string
	limits      limitFlags
}

// limitFlags are the flags of the limits of a restore.
type limitFlags struct {
	requests int64
	bytes    string
}

func (l *limitFlags) register(cmd *cobra.Command) {
	cmd.Flags().Int64Var(
		&l.requests, "max-requests", 0,
		"at most this `number` of requests per second to the object store (default: no limit)",
	)
	cmd.Flags().StringVar(
		&l.bytes, "max-rate", "", "copy at most this number of `bytes` per second, such as 50MiB (default: no limit)",
	)
}

func (l *limitFlags) message() (*snapshotdv1.RestoreLimits, error) {
	if l.requests < 0 {
		return nil, usageErrorf("--max-requests %d: use a number above 0, or omit it", l.requests)
	}
	bytes, err := parseBytes(l.bytes)
	if err != nil {
		return nil, err
	}
	return &snapshotdv1.RestoreLimits{RequestsPerSecond: l.requests, BytesPerSecond: bytes}, nil
}

// parseBytes parses a number of bytes with an optional unit; empty means 0.
func parseBytes(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	number, unit := s, int64(1)
	for _, u := range []struct {
		suffix string
		size   int64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"B", 1}} {
		if rest, ok := strings.CutSuffix(s, u.suffix); ok {
			number, unit = rest, u.size
			break
		}
	}
	n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64/unit {
		return 0, usageErrorf("--max-rate %q: use bytes per second such as 500KiB, 50MiB or 1GiB", s)
	}
	return n * unit, nil
}

func (f *restoreFlags) register(cmd *cobra.Command) {
	f.snapshot = addSnapshotArg(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.to, "to", "", "the `collection` to create: NAME or DB/NAME (required)")
	flags.StringArrayVar(&f.partitions, "partition", nil, "restore only this `partition`; may be repeated (default all)")
	flags.StringArrayVar(
		&f.channels, "channel", nil,
		"`name` of the target's next channel, in shard order; all or none (default: the snapshot's)",
	)
	flags.StringArrayVar(
		&f.properties, "property", nil, "set a `key=value` property of the target, or omit it with `key=`; may be repeated",
	)
	flags.StringArrayVar(&f.labels, "label", nil, "label the job with `key=value`; may be repeated")
	flags.BoolVar(&f.skipIndexes, "skip-indexes", false, "omit indexes and their builds")
	flags.Int32Var(&f.priority, "priority", 0, "`number` from -100 to 100: a higher priority gets workers first")
	flags.StringVar(
		&f.timeout, "give-up-after", "",
		"fail the job if it has not ended after this time `span`, such as 2h (default: never)",
	)
	f.limits.register(cmd)
}

// restoreRequest builds the request from the flags.
func (a *app) restoreRequest(f *restoreFlags, args []string) (*snapshotdv1.RestoreSnapshotRequest, error) {
	ref, err := a.snapshotRef(f.snapshot, args)
	if err != nil {
		return nil, err
	}
	if f.to == "" {
		return nil, usageErrorf("--to is missing")
	}
	target, err := parseCollection(f.to)
	if err != nil {
		return nil, err
	}
	if target.GetName() == nil {
		return nil, usageErrorf("--to %q: a new collection needs a name; its id is allocated", f.to)
	}
	a.collection = f.to
	req := &snapshotdv1.RestoreSnapshotRequest{
		Snapshot: ref, Target: target.GetName(), Partitions: f.partitions, Channels: f.channels, SkipIndexes: f.skipIndexes,
		Priority: f.priority,
	}
	if req.Labels, err = parseLabels(f.labels); err != nil {
		return nil, err
	}
	for _, p := range f.properties {
		key, value, ok := strings.Cut(p, "=")
		if !ok || key == "" {
			return nil, usageErrorf("--property %q: use key=value, or key= to omit it", p)
		}
		if req.Properties == nil {
			req.Properties = map[string]string{}
		}
		req.Properties[key] = value
	}
	if req.Limits, err = f.limits.message(); err != nil {
		return nil, err
	}
	if f.timeout != "" {
		d, err := parseTTL(f.timeout)
		if err != nil || d < time.Second || d > 30*day {
			return nil, usageErrorf("--give-up-after %q: use a time span such as 2h or 1d, 1s to 30d", f.timeout)
		}
		req.Timeout = durationpb.New(d)
	}
	return req, nil
}

func (a *app) restorePlan() *cobra.Command {
	var (
		f        restoreFlags
		noVerify bool
	)
	cmd := &cobra.Command{
		Use:   "plan SNAPSHOT --to COLLECTION",
		Short: "Shows the plan of a restore",
		Long: `Shows the plan of a restore, without changes: the amount of data to copy, conflicts,
and missing files of the snapshot. --no-verify skips the check for missing files,
which takes a request per file.`,
		Example: `  snapshotctl restore plan nightly --to products_copy
  snapshotctl restore plan nightly --to products_copy --partition eu --no-verify`,
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&noVerify, "no-verify", false, "do not check each file in the object store")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		req, err := a.restoreRequest(&f, args)
		if err != nil {
			return err
		}
		req.DryRun, req.Verify = true, !noVerify
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.RestoreSnapshot, req)
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) { renderPlan(w, resp.GetPlan(), req) })
	})
	return cmd
}

func renderPlan(w io.Writer, p *snapshotdv1.RestorePlan, req *snapshotdv1.RestoreSnapshotRequest) {
	keyValues(w, "",
		"segments", p.GetSegments(),
		"files", p.GetFiles(),
		"to copy", size(p.GetBytes()),
		"requests", fmt.Sprintf("about %d", p.GetRequests()),
		"takes", "about "+p.GetEstimatedTime().AsDuration().Round(100*time.Millisecond).String(),
	)
	switch {
	case !req.GetVerify():
		fprintf(w, "missing files: not checked\n")
	case p.GetMissingCount() == 0:
		fprintf(w, "missing files: none\n")
	default:
		fprintf(w, "missing files: %d\n", p.GetMissingCount())
		for _, name := range p.GetMissing() {
			fprintf(w, "  %s\n", clean(name))
		}
	}
	for _, conflict := range p.GetConflicts() {
		fprintf(w, "conflict: %s\n", clean(conflict))
	}
	if len(p.GetConflicts()) == 0 && p.GetMissingCount() == 0 {
		fprintf(w, "no conflicts\n")
	}
}

func (a *app) restoreStart() *cobra.Command {
	var (
		f     restoreFlags
		wait  bool
		token string
	)
	cmd := &cobra.Command{
		Use:   "start SNAPSHOT --to COLLECTION",
		Short: "Starts a restore",
		Long: `Starts a restore job and returns; the job runs on independently of this command and of
single servers. With --wait it shows the progress until the job ends, and fails if the
job fails.`,
		Example: `  snapshotctl restore start nightly --to products_copy --wait
  snapshotctl restore start nightly --to prod/products_copy --partition eu --max-rate 50MiB`,
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until the job has ended")
	cmd.Flags().StringVar(&token, "request-token", "", "`token` of an earlier run of the same command, to get its job")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		req, err := a.restoreRequest(&f, args)
		if err != nil {
			return err
		}
		if req.RequestToken = token; token == "" {
			req.RequestToken = client.NewRequestToken()
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.RestoreSnapshot, req)
		if err != nil {
			return err
		}
		if wait {
			return a.watchJob(ctx, c, resp.GetJobId())
		}
		return a.print(resp, func(w io.Writer) {
			fprintf(w, "restore job %d creates collection %s (#%d)\n", resp.GetJobId(), clean(f.to), resp.GetCollectionId())
			fprintf(w, "to watch: snapshotctl restore watch %d\n", resp.GetJobId())
			fprintf(w, "to undo: snapshotctl restore cancel %d\n", resp.GetJobId())
		})
	})
	return cmd
}

// watchJob shows the progress of a job until it ends, then prints it. It returns an
// error unless the job is COMPLETED.
func (a *app) watchJob(ctx context.Context, c *client.Client, id int64) error {
	bar := a.bar()
	var last *snapshotdv1.RestoreJob
	err := client.WatchRestore(ctx, c.Snapshots, id, func(job *snapshotdv1.RestoreJob) error {
		last = job
		bar.show(job)
		return nil
	})
	bar.done()
	if err != nil {
		return withJobHint(err)
	}
	if err := a.print(&snapshotdv1.WatchRestoreResponse{Job: last}, func(w io.Writer) { renderJob(w, last) }); err != nil {
		return err
	}
	if last.GetState() != snapshotdv1.RestoreJob_STATE_COMPLETED {
		return &hintError{
			fmt.Errorf("restore job %d is %s: %s", id, stateName(last.GetState()), clean(last.GetMessage())),
			"the target was rolled back and its name is free",
		}
	}
	return nil
}

// withJobHint adds the hint for a job: snapshots share its reasons.
func withJobHint(err error) error {
	if slices.Contains([]string{"EXPIRED_OR_DROPPED", "NEVER_EXISTED"}, client.Reason(err)) {
		return &hintError{err, "list the jobs with `snapshotctl restore list`; an ended job is kept for a limited time"}
	}
	return err
}

// bar draws the progress of a job, on a terminal only.
type bar struct{ bar *progressbar.ProgressBar }

func (a *app) bar() *bar {
	f, ok := a.err.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) || a.output != formatTable { //nolint:gosec // a file descriptor
		return &bar{}
	}
	return &bar{progressbar.NewOptions64(1000,
		progressbar.OptionSetWriter(f), progressbar.OptionSetWidth(30), progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(), progressbar.OptionSetElapsedTime(false), progressbar.OptionSetPredictTime(false))}
}

func (b *bar) show(job *snapshotdv1.RestoreJob) {
	if b.bar == nil {
		return
	}
	p := job.GetProgress()
	text := fmt.Sprintf(
		"%s  %d of %d files, %s of %s", phase(job), p.GetFilesDone(), p.GetFilesTotal(), size(p.GetBytesDone()),
		size(p.GetBytesTotal()),
	)
	if p.GetBytesPerSecond() > 0 {
		text += fmt.Sprintf(", %s/s", size(p.GetBytesPerSecond()))
	}
	b.bar.Describe(text)
	_ = b.bar.Set64(int64(1000 * p.GetFraction())) // only drawing
}

func (b *bar) done() {
	if b.bar != nil {
		_ = b.bar.Clear()
	}
}

func phase(job *snapshotdv1.RestoreJob) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(job.GetPhase().String(), "PHASE_"), "_", " "))
}

var jobHeader = []string{
	"JOB", "SNAPSHOT", "TARGET", "STATE", "PHASE", "DONE", "FILES", "SIZE", "STARTED", "TOOK", "REASON",
}

func jobCells(job *snapshotdv1.RestoreJob) []any {
	p := job.GetProgress()
	took := "-"
	if job.GetEndTime() != nil && job.GetStartTime() != nil {
		took = job.GetEndTime().AsTime().Sub(job.GetStartTime().AsTime()).Round(time.Millisecond).String()
	}
	return []any{
		job.GetId(), job.GetSnapshotName(), job.GetTarget().GetDb() + "/" + job.GetTarget().GetName(),
		stateName(job.GetState()), phase(job),
		percent(p.GetFraction()), p.GetFilesTotal(), size(p.GetBytesTotal()), job.GetStartTime(), took, job.GetReason(),
	}
}

// limitText formats the limits of a job.
func limitText(l *snapshotdv1.RestoreLimits) string {
	var parts []string
	if n := l.GetBytesPerSecond(); n > 0 {
		parts = append(parts, size(n)+"/s")
	}
	if n := l.GetRequestsPerSecond(); n > 0 {
		parts = append(parts, fmt.Sprintf("%d requests/s", n))
	}
	return strings.Join(parts, ", ")
}

func percent(fraction float64) string { return fmt.Sprintf("%d%%", int(100*fraction)) }

func renderJob(w io.Writer, job *snapshotdv1.RestoreJob) {
	p := job.GetProgress()
	left := "-"
	if p.GetRemaining() != nil {
		left = p.GetRemaining().AsDuration().Round(time.Second).String()
	}
	keyValues(w, "",
		"job", job.GetId(),
		"state", stateName(job.GetState()),
		"phase", phase(job),
		"snapshot", fmt.Sprintf("%s (#%d)", clean(job.GetSnapshotName()), job.GetSnapshotId()),
		"target", fmt.Sprintf("%s/%s (#%d)", job.GetTarget().GetDb(), job.GetTarget().GetName(), job.GetTarget().GetId()),
		"done", percent(p.GetFraction()),
		"segments", fmt.Sprintf("%d of %d", p.GetSegmentsDone(), p.GetSegmentsTotal()),
		"files", fmt.Sprintf("%d of %d", p.GetFilesDone(), p.GetFilesTotal()),
		"copied", fmt.Sprintf("%s of %s", size(p.GetBytesDone()), size(p.GetBytesTotal())),
		"rate", size(p.GetBytesPerSecond())+"/s",
		"time left", left,
		"limits", limitText(job.GetLimits()),
		"task retries", p.GetRetries(),
		"created", job.GetCreateTime(),
		"started", job.GetStartTime(),
		"ended", job.GetEndTime(),
		"deadline", job.GetDeadline(),
		"reason", job.GetReason(),
		"message", job.GetMessage(),
		"last error", job.GetLastError(),
		"waiting since", job.GetWaitingSince(),
		"refused since", job.GetRefusedSince(),
		"labels", formatMap(job.GetLabels()),
	)
}

func (a *app) restoreStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "status JOB",
		Short:   "Shows a restore job",
		Long:    "Shows the progress or the result of a restore job.",
		Example: `  snapshotctl restore status 65`,
		Args:    exactArgs("JOB"),
	}
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		id, err := parseID(args[0])
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.GetRestoreState, &snapshotdv1.GetRestoreStateRequest{JobId: id})
		if err != nil {
			return withJobHint(err)
		}
		return a.print(resp, func(w io.Writer) { renderJob(w, resp.GetJob()) })
	})
	return cmd
}

func (a *app) restoreWatch() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "watch JOB",
		Short: "Watches a restore job until it ends",
		Long: `Watches a restore job until it ends, with a progress bar on a terminal. It fails
unless the job is COMPLETED.`,
		Example: `  snapshotctl restore watch 65`,
		Args:    exactArgs("JOB"),
	}
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		id, err := parseID(args[0])
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		return a.watchJob(ctx, c, id)
	})
	return cmd
}

func (a *app) restoreList() *cobra.Command {
	var (
		limit    int
		db       string
		snapshot int64
		states   []string
		labels   []string
	)
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Lists restore jobs",
		Long:  "Lists restore jobs, newest first. Ended jobs are kept for keep_restores, a week by default.",
		Example: `  snapshotctl restore list
  snapshotctl restore list --state executing -o json`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	f.IntVar(&limit, "limit", 0, "list at most this `number` (default all)")
	f.StringVar(&db, "db", "", "only jobs with a target in this `database`")
	f.Int64Var(&snapshot, "snapshot-id", 0, "only jobs of the snapshot with this `id`, which may be dropped")
	f.StringSliceVar(&states, "state", nil, "only jobs in this `state`: pending, executing, completed, failed, canceled")
	f.StringArrayVar(&labels, "label", nil, "only jobs with this `key=value` label; may be repeated")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		req := &snapshotdv1.ListRestoreJobsRequest{Db: db, SnapshotId: snapshot}
		var err error
		if req.Labels, err = parseLabels(labels); err != nil {
			return err
		}
		for _, s := range states {
			v, ok := snapshotdv1.RestoreJob_State_value["STATE_"+strings.ToUpper(s)]
			if !ok || v == 0 {
				return usageErrorf("--state %q: use pending, executing, completed, failed or canceled", s)
			}
			req.States = append(req.States, snapshotdv1.RestoreJob_State(v))
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		l := a.list("jobs", jobHeader...)
		err = pages(limit, func(size int32, token string) (int, string, error) {
			req.PageSize, req.PageToken = size, token
			resp, err := unary(ctx, a, c.Snapshots.ListRestoreJobs, req)
			if err != nil {
				return 0, "", err
			}
			for _, job := range resp.GetJobs() {
				if err := l.add(job, jobCells(job)...); err != nil {
					return 0, "", err
				}
			}
			return len(resp.GetJobs()), resp.GetNextPageToken(), l.flush()
		})
		if err != nil {
			return err
		}
		return l.close()
	})
	return cmd
}

func (a *app) restoreLimit() *cobra.Command {
	var limits limitFlags
	cmd := &cobra.Command{
		Use:   "limit JOB",
		Short: "Changes the limits of a restore job",
		Long:  "Changes the limits of a running restore job. An omitted limit is removed.",
		Example: `  snapshotctl restore limit 65 --max-rate 20MiB
  snapshotctl restore limit 65`,
		Args: exactArgs("JOB"),
	}
	limits.register(cmd)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		id, err := parseID(args[0])
		if err != nil {
			return err
		}
		req := &snapshotdv1.UpdateRestoreRequest{JobId: id}
		if req.Limits, err = limits.message(); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.UpdateRestore, req)
		if err != nil {
			return withJobHint(err)
		}
		return a.print(resp, func(w io.Writer) { renderJob(w, resp.GetJob()) })
	})
	return cmd
}

func (a *app) restoreCancel() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cancel JOB",
		Short: "Cancels a restore job",
		Long: `Cancels a restore job: its target does not appear, and its copies are deleted in the
background. The name is free when the job is CANCELED.`,
		Example: `  snapshotctl restore cancel 65`,
		Args:    exactArgs("JOB"),
	}
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		id, err := parseID(args[0])
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Snapshots.CancelRestore, &snapshotdv1.CancelRestoreRequest{JobId: id})
		if err != nil {
			return withJobHint(err)
		}
		return a.print(resp, func(w io.Writer) {
			job := resp.GetJob()
			fprintf(w, "restore job %d is %s, in phase %s: %s/%s will not appear\n", id, stateName(job.GetState()), phase(job),
				job.GetTarget().GetDb(), job.GetTarget().GetName())
		})
	})
	return cmd
}
