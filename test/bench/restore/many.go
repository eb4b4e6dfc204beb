//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/replica"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/bench"
)

// The bars of a large job.
const (
	barSegments = 100_000
	maxRecord   = 4 << 10
	maxHeap     = 200 << 20
	maxEach     = 0.0004 // seconds
	maxWrites   = 2      // per task, before it resumes copying
)

const manyRoot = etcdRoot + "-many"

// manyJob is a request of the parent, manyResult its result.
type manyJob struct {
	Op       string // setup, restore, begin or resume
	Segments int
	Snapshot int64
	First    int64 // segment
	Job      int64
}

type manyResult struct {
	Error           string
	Snapshot, First int64
	Job             int64
	Seconds         float64
	Heap            float64 // bytes, the maximum
	JobBytes        int     // of the largest record
	TaskBytes       int
	Files           int64

	Tasks  int // resumed tasks
	Writes int // maximum per task before it resumed
	All    int // for all jobs and tasks, before the first copy
}

// many measures a job of many segments: its time and memory, the size of its
// records, and the cost of resuming it after the process is killed.
func (e *env) many(ctx context.Context) error {
	e.stop()
	bits := filepath.Join(e.Root, "many")
	c, err := e.startMany(ctx, bits)
	if err != nil {
		return err
	}
	defer func() { c.process.Stop() }()
	made := &manyResult{}
	if err := c.do(ctx, manyJob{Op: "setup", Segments: e.segments}, made); err != nil {
		return err
	}
	e.Logf("%d segments: registered", e.segments)
	task := manyJob{Segments: e.segments, Snapshot: made.Snapshot, First: made.First}
	var times []float64
	all := &manyResult{}
	for range e.Rounds {
		task.Op = "restore"
		res := &manyResult{}
		if err := c.do(ctx, task, res); err != nil {
			return err
		}
		e.Logf("%d segments: restore %s, peak heap %s", e.segments, bench.Time(res.Seconds), bench.MiB(res.Heap))
		times = append(times, res.Seconds)
		all.Heap, all.JobBytes, all.TaskBytes = max(
			all.Heap,
			res.Heap,
		), max(
			all.JobBytes,
			res.JobBytes,
		), max(
			all.TaskBytes,
			res.TaskBytes,
		)
		if e.Since() > e.Bound-5*time.Minute { // the rest is for the restart
			break
		}
	}
	each := bench.Median(times) / float64(e.segments)
	e.table(tableMany).Add(
		strconv.Itoa(e.segments),
		strconv.Itoa(e.segments*files),
		bench.Time(bench.Median(times)),
		fmt.Sprintf("%.3f", each*1000),
		bench.MiB(all.Heap),
		strconv.Itoa(all.JobBytes),
		strconv.Itoa(all.TaskBytes),
		bench.LoadText(),
	)
	what := fmt.Sprintf("%d segments of %d files", e.segments, files)
	e.counted(
		what+": largest record of a job or task",
		"< 4096 bytes",
		strconv.Itoa(max(all.JobBytes, all.TaskBytes)),
		max(all.JobBytes, all.TaskBytes) < maxRecord,
	)
	if e.segments >= barSegments {
		e.counted(what+": peak heap", "≤ 200 MiB", bench.MiB(all.Heap), all.Heap <= maxHeap)
	}
	e.timed(what+": time per segment", "≤ 0.4 ms", fmt.Sprintf("%.3f ms", each*1000), each <= maxEach, times)
	return e.restart(ctx, &c, bits, task, bench.Median(times))
}

// restart kills the process in the middle of a job and resumes it in another.
func (e *env) restart(ctx context.Context, c **manyProcess, bits string, task manyJob, usual float64) error {
	task.Op = "begin"
	begun := &manyResult{}
	if err := (*c).do(ctx, task, begun); err != nil {
		return err
	}
	t := time.NewTimer(time.Duration(usual / 2 * float64(time.Second)))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	(*c).process.Kill()
	(*c).process.Stop()
	left, err := e.unfinished(ctx, begun.Job)
	if err != nil {
		return err
	}
	if left == 0 {
		return errors.New("the job had ended before it was interrupted")
	}
	next, err := e.startMany(ctx, bits)
	if err != nil {
		return err
	}
	*c = next
	task.Op, task.Job = "resume", begun.Job
	res := &manyResult{}
	if err := next.do(ctx, task, res); err != nil {
		return err
	}
	e.Logf("killed with %d tasks left: %d writes before the first copy, at most %d for a task", left, res.All, res.Writes)
	e.counted(
		fmt.Sprintf(
			"killed with %d unfinished tasks: etcd writes per task before it resumes (maximum %d)",
			left,
			res.Writes,
		),
		"≤ 2",
		fmt.Sprintf("%.2f", float64(res.All)/float64(max(1, left))),
		res.Tasks > 0 && res.All <= maxWrites*left,
	)
	return nil
}

// unfinished returns the number of unfinished tasks of a job.
func (e *env) unfinished(ctx context.Context, job int64) (left int, err error) {
	kv, err := openEtcd(e.etcdAt, manyRoot)
	if err != nil {
		return 0, err
	}
	defer func() { _ = kv.Close() }()
	from, to := meta.Prefix(keys.TaskPrefix(job))
	_, err = kv.Scan(ctx, from, to, 0, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			rec := &storagev1.Task{}
			if err := record.Decode(kv, rec); err != nil {
				return err
			}
			if copyjob.TaskState(rec.GetState()) != copyjob.TaskDone {
				left++
			}
		}
		return nil
	})
	return left, err
}

// manyProcess is the parent's side.
type manyProcess struct {
	process *bench.Process
	out     *bufio.Reader
}

func (e *env) startMany(ctx context.Context, bits string) (*manyProcess, error) {
	p, err := bench.StartSelf(ctx, e.Root, "many", e.etcdAt, bits)
	if err != nil {
		return nil, err
	}
	return &manyProcess{p, bufio.NewReader(p.Stdout)}, nil
}

func (p *manyProcess) do(ctx context.Context, j manyJob, res *manyResult) error {
	if err := p.process.Call(ctx, p.out, j, res); err != nil {
		return err
	}
	if res.Error != "" {
		return fmt.Errorf("%s: %s", j.Op, res.Error)
	}
	return nil
}

// manyChild is the child's side: a replica on an object store in memory with all
// files of the source.
func manyChild(ctx context.Context, endpoint, bits string, in io.Reader, out io.Writer) error {
	inner, err := openEtcd(endpoint, manyRoot)
	if err != nil {
		return err
	}
	defer func() { _ = inner.Close() }()
	kv := &counting{KV: inner}
	store, err := openVirtual(bits) //nolint:contextcheck // opening a directory takes no time
	if err != nil {
		return err
	}
	store.onCopy = kv.freeze
	info, err := cluster.Open(ctx, kv, cluster.Options{Release: "bench", Now: time.Now, Rand: rand.Reader})
	if err != nil {
		return err
	}
	const alias = "default"
	stores := map[string]object.Store{alias: store}
	requests := request.NewLeases(kv, time.Now, nil)
	cat := catalog.New(catalog.Options{
		KV:       kv,
		Now:      time.Now,
		Rand:     rand.Reader,
		Requests: requests,
		HasStore: func(name string) bool { return name == alias },
	})
	r, err := replica.New(replica.Options{Shared: replica.Shared{
		KV: kv, Catalog: cat, Stores: stores, SnapshotStore: alias, Requests: requests,
		Replica: fmt.Sprintf("many-%d", os.Getpid()), Now: time.Now, Rand: rand.Reader, Log: zap.NewNop(),
	}})
	if err != nil {
		return err
	}
	m := manager.New(manager.Options{
		Shared: r.Shared, Snapshots: r.Snapshots, GC: r.GC, Collector: r.Collector, Jobs: r.Jobs,
		Cluster: info, Release: "bench",
	})
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.Run(ctx, m) })
	group.Go(func() error {
		defer cancel()
		d := &many{kv: kv, catalog: cat, manager: m, store: store}
		lines := bufio.NewScanner(in)
		for lines.Scan() {
			var j manyJob
			if err := json.Unmarshal(lines.Bytes(), &j); err != nil {
				return err
			}
			res := &manyResult{}
			if err := d.do(ctx, j, res); err != nil {
				res.Error = err.Error()
			}
			if err := json.NewEncoder(out).Encode(res); err != nil {
				return err
			}
		}
		return lines.Err()
	})
	return group.Wait()
}

type many struct {
	kv      *counting
	catalog *catalog.Catalog
	manager *manager.Manager
	store   *virtual
	names   int
}

func (d *many) do(ctx context.Context, j manyJob, res *manyResult) error {
	d.store.use(j.First, j.Segments)
	switch j.Op {
	case "setup":
		return d.setup(ctx, j, res)
	case "restore":
		return d.restore(ctx, j, res)
	case "begin":
		d.store.forget()
		job, err := d.begin(ctx, j)
		if err == nil {
			res.Job = job.ID
		}
		return err
	case "resume":
		return d.resume(ctx, j, res)
	}
	return fmt.Errorf("unknown job %q", j.Op)
}

// setup registers segments and takes a snapshot.
func (d *many) setup(ctx context.Context, j manyJob, res *manyResult) error {
	col, err := d.catalog.CreateCollection(ctx, request.Token{}, catalog.Collection{
		DB:       "default",
		Name:     "many",
		Channels: []string{"many-0"},
		Roots:    []catalog.Root{{Store: "default", Prefix: "data/many/"}},
	})
	if err != nil {
		return err
	}
	ref := catalog.Ref{ID: col.ID}
	p, err := d.catalog.CreatePartition(ctx, request.Token{}, ref, catalog.Partition{Name: "p"})
	if err != nil {
		return err
	}
	x, err := d.catalog.CreateIndex(ctx, request.Token{}, ref, catalog.Index{Name: "x", Field: firstField})
	if err != nil {
		return err
	}
	ids, err := d.catalog.AllocateRange(ctx, int64(2*j.Segments))
	if err != nil {
		return err
	}
	d.store.use(ids.First, j.Segments)
	const batch = 500
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for from := 0; from < j.Segments; from += batch {
		group.Go(func() error {
			var list []segment.Segment
			for i := from; i < min(from+batch, j.Segments); i++ {
				list = append(list, newSegment(col.ID, p.ID, x.ID, ids.First+int64(i), ids.First+int64(j.Segments+i)))
			}
			_, _, err := d.catalog.AddSegments(groupCtx, col.ID, list)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if _, err := d.catalog.SetCheckpoints(
		ctx,
		ref,
		[]catalog.Checkpoint{{Position: segment.Position{Timestamp: segment.Timestamp(lastTimestamp)}}},
	); err != nil {
		return err
	}
	s, err := d.manager.Create(ctx, request.Token{}, manager.CreateSpec{Collection: ref, Name: "many"})
	if err != nil {
		return err
	}
	res.Snapshot, res.First = s.ID, ids.First
	return nil
}

func (d *many) begin(ctx context.Context, j manyJob) (*copyjob.Job, error) {
	d.names++
	return d.manager.Restore(ctx, request.Token{}, &manager.RestoreSpec{
		Snapshot: manager.Ref{ID: j.Snapshot}, DB: "default", Name: fmt.Sprintf("target-%d-%d", os.Getpid(), d.names),
	})
}

func (d *many) restore(ctx context.Context, j manyJob, res *manyResult) error {
	d.store.forget()
	debug.FreeOSMemory()
	ended, err := watchJobs(ctx, d.kv)
	if err != nil {
		return err
	}
	defer ended.stop()
	peak := watchHeap(ctx)
	begin := time.Now()
	job, err := d.begin(ctx, j)
	if err != nil {
		return err
	}
	at, err := completed(ctx, ended, job.ID, int64(j.Segments)*files)
	if err != nil {
		return err
	}
	res.Seconds, res.Heap = at.Sub(begin).Seconds(), peak()
	res.JobBytes, res.TaskBytes = int(d.kv.job.Load()), int(d.kv.task.Load())
	return nil
}

// resume waits for the end of a job of another process.
func (d *many) resume(ctx context.Context, j manyJob, res *manyResult) error {
	ended, err := watchJobs(ctx, d.kv)
	if err != nil {
		return err
	}
	defer ended.stop()
	if _, err := completed(ctx, ended, j.Job, int64(j.Segments)*files); err != nil {
		return err
	}
	res.Tasks, res.Writes, res.All = d.kv.frozen()
	return nil
}

func completed(ctx context.Context, ended *jobsEnd, id, files int64) (time.Time, error) {
	job, at, err := ended.wait(ctx, id)
	if err == nil && (job.State != copyjob.Completed || job.Done.Files != files) {
		err = fmt.Errorf(
			"restore job %v is %v with %d of %d files: %s %s",
			job,
			job.State,
			job.Done.Files,
			files,
			job.Reason,
			job.Message,
		)
	}
	return at, err
}

// watchHeap samples the heap until its result is called. That returns the maximum,
// garbage included.
func watchHeap(ctx context.Context) (peak func() float64) {
	ctx, cancel := context.WithCancel(ctx)
	most := make(chan float64, 1)
	go func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		highest := uint64(0)
		for {
			metrics.Read(sample)
			highest = max(highest, sample[0].Value.Uint64())
			select {
			case <-ctx.Done():
				most <- float64(highest)
				return
			case <-tick.C:
			}
		}
	}()
	return func() float64 {
		cancel()
		return <-most
	}
}

// counting counts the writes for jobs and tasks and records their maximum size.
type counting struct {
	meta.KV
	job, task atomic.Int64 // bytes of the largest record
	all       atomic.Int64 // writes for jobs, tasks and workers
	first     atomic.Int64 // 1 more than all before the first copy
	tasks     [1 << 14]struct {
		writes, frozen atomic.Int64 // frozen: 1 more than the writes before its first copy
	}
}

// Txn implements [meta.KV].
func (c *counting) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	res, err := c.KV.Txn(ctx, t)
	if err == nil && res.Succeeded {
		for i := range t.Then {
			c.note(&t.Then[i])
		}
	}
	return res, err
}

func (c *counting) note(op *meta.Op) {
	if op.Kind == meta.OpGet || op.To != "" {
		return
	}
	n := int64(len(op.Value))
	switch {
	case strings.HasPrefix(op.From, keys.JobPrefix):
		atLeast(&c.job, n)
	case strings.HasPrefix(op.From, keys.AllTasksPrefix),
		strings.HasPrefix(op.From, keys.AllProgressPrefix),
		strings.HasPrefix(op.From, keys.AssignedPrefix):
		atLeast(&c.task, n)
		if _, number, err := keys.LastTwo(op.From); err == nil && number < int64(len(c.tasks)) {
			c.tasks[number].writes.Add(1)
		}
	case strings.HasPrefix(op.From, keys.WorkerPrefix):
	default:
		return
	}
	c.all.Add(1)
}

func atLeast(a *atomic.Int64, n int64) {
	for {
		old := a.Load()
		if old >= n || a.CompareAndSwap(old, n) {
			return
		}
	}
}

// freeze records the counts before the first copy of a segment's task.
func (c *counting) freeze(ordinal int64) {
	if c.first.Load() == 0 {
		c.first.CompareAndSwap(0, c.all.Load()+1)
	}
	if t := &c.tasks[ordinal/copyjob.TaskSegments]; t.frozen.Load() == 0 {
		t.frozen.CompareAndSwap(0, t.writes.Load()+1)
	}
}

func (c *counting) frozen() (tasks, writes, all int) {
	for i := range c.tasks {
		if n := int(c.tasks[i].frozen.Load()); n > 0 {
			tasks, writes = tasks+1, max(writes, n-1)
		}
	}
	return tasks, writes, int(max(0, c.first.Load()-1))
}
