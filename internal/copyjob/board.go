package copyjob

import (
	"context"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// rateSpan is how long back a job's rate is taken.
const rateSpan = 30 * time.Second

// board is every job, task and worker in memory, kept current by watches. What
// is done about one is decided by the compares of a transaction.
type board struct {
	o       *Options
	jobs    *follow.Follower
	workers *follow.Follower
	wake    chan struct{} // size one; for the leader

	mu       sync.Mutex
	rows     map[int64]*row
	pool     map[int64]*poolWorker
	assigned map[string]bool // assignment keys
	moved    chan struct{}   // closed and replaced with every change
}

// row is a job with its tasks.
type row struct {
	job     *Job // nil while only parts of it were seen
	tasks   map[int64]*task
	open    map[int64]*task          // those that are not done
	running map[int64]segment.Totals // files and bytes of tasks that are not done
	limits  Limits
	done    segment.Totals // sums of the tasks that are done
	shown   segment.Totals // the most that was ever told
	lastErr string
	finish  time.Time // when an attempt last finished a file that none had before
	samples []sample
}

// sample is how many bytes were done at a time.
type sample struct {
	at    time.Time
	bytes int64
}

// poolWorker is a worker that lives.
type poolWorker struct {
	id     int64
	slots  int
	lease  meta.LeaseID
	create int64
}

func newBoard(o *Options) *board {
	b := &board{o: o, wake: make(chan struct{}, 1), moved: make(chan struct{}), rows: map[int64]*row{}}
	b.pool, b.assigned = map[int64]*poolWorker{}, map[string]bool{}
	from, to := meta.Prefix("/job/")
	b.jobs = follow.New(follow.Options{KV: o.KV, From: from, To: to, Handler: (*jobHandler)(b), Log: o.Log, Rand: o.Jitter})
	from, to = meta.Prefix("/worker/")
	b.workers = follow.New(follow.Options{KV: o.KV, From: from, To: to, Handler: (*workerHandler)(b), Log: o.Log, Rand: o.Jitter})
	return b
}

func (b *board) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return b.jobs.Run(ctx) })
	group.Go(func() error { return b.workers.Run(ctx) })
	return group.Wait()
}

// sync waits until the board shows all that was written to jobs before the call.
func (b *board) sync(ctx context.Context) error {
	_, err := b.jobs.Sync(ctx)
	return err
}

// changed tells those who wait. The lock must be held.
func (b *board) changed() {
	close(b.moved)
	b.moved = make(chan struct{})
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// jobHandler is the board as the handler of jobs.
type jobHandler board

// Reset implements follow.Handler.
func (h *jobHandler) Reset(kvs []meta.KeyValue, _ int64) {
	b := (*board)(h)
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.rows
	b.rows = map[int64]*row{}
	for _, kv := range kvs {
		b.put(kv)
	}
	for id, r := range b.rows { // what was told stays told
		if o := old[id]; o != nil {
			r.shown, r.samples = o.shown, o.samples
			for number, t := range r.tasks {
				if seen := o.tasks[number]; seen != nil && seen.revision == t.revision {
					t.seen = seen.seen
				}
			}
		}
	}
	b.changed()
}

// Apply implements follow.Handler.
func (h *jobHandler) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	b := (*board)(h)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range events {
		if e.Deleted {
			b.remove(e.KV.Key)
		} else {
			b.put(e.KV)
		}
	}
	b.changed()
}

func (b *board) row(id int64) *row {
	r := b.rows[id]
	if r == nil {
		r = &row{tasks: map[int64]*task{}, open: map[int64]*task{}, running: map[int64]segment.Totals{}}
		b.rows[id] = r
	}
	return r
}

func (b *board) put(kv meta.KeyValue) {
	var err error
	switch {
	case strings.HasPrefix(kv.Key, keys.JobPrefix):
		var job *Job
		if job, err = DecodeJob(kv); err == nil {
			b.row(job.ID).job = job
		}
	case strings.HasPrefix(kv.Key, keys.AllTasksPrefix):
		var t *task
		if t, err = decodeTask(kv); err == nil {
			t.seen = b.o.Clock.Elapsed()
			b.row(t.job).setTask(t)
		}
	case strings.HasPrefix(kv.Key, keys.AllProgressPrefix):
		var job, number int64
		rec := &storagev1.TaskProgress{}
		if job, number, err = keys.LastTwo(kv.Key); err == nil {
			if err = record.Decode(kv, rec); err == nil {
				b.row(job).setRunning(number, segment.Totals{Files: rec.GetFiles(), Bytes: rec.GetBytes()})
				b.row(job).finish = later(b.row(job).finish, record.Time(rec.GetFinishTime()))
			}
		}
	default:
		var id int64
		rec := &storagev1.JobLimits{}
		if id, err = keys.LastID(kv.Key); err == nil {
			if err = record.Decode(kv, rec); err == nil {
				b.row(id).limits = Limits{Requests: rec.GetRequests(), Bytes: rec.GetBytes()}
			}
		}
	}
	if err != nil {
		b.o.Log.Error("record of a restore is left alone", zap.String("key", kv.Key), zap.Error(err))
	}
}

func (r *row) setTask(t *task) {
	if old := r.tasks[t.number]; old != nil && old.state == TaskDone {
		r.done = minus(r.done, old.totals)
	}
	r.tasks[t.number], r.open[t.number] = t, t
	r.finish = later(r.finish, t.finishTime)
	if t.state == TaskDone {
		r.done = plus(r.done, t.totals)
		delete(r.running, t.number)
		delete(r.open, t.number)
	}
	if t.message != "" {
		r.lastErr = t.message
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// stall returns since when the job has waited for a store that does not answer, and
// how long: up to the last attempt that got none. The time is zero while no task
// waits.
func (r *row) stall() (since time.Time, d time.Duration) {
	for _, t := range r.open {
		if t.waits == 0 || t.refusals > 0 { // a refusal is an answer
			continue
		}
		from := later(t.waitSince, r.finish)
		if since.IsZero() || from.Before(since) {
			since = from
		}
		d = max(d, t.waitTime.Sub(from))
	}
	return since, d
}

// refusedSince returns since when a store has refused tasks of the job; zero: it
// refuses none.
func (r *row) refusedSince() (since time.Time) {
	for _, t := range r.open {
		if t.refusals > 0 && (since.IsZero() || t.refuseSince.Before(since)) {
			since = t.refuseSince
		}
	}
	return since
}

// setRunning notes how far a task has come. Another attempt begins with what it
// finds, so that nothing goes down.
func (r *row) setRunning(number int64, n segment.Totals) {
	if t := r.tasks[number]; t != nil && t.state == TaskDone {
		return
	}
	if n.Bytes >= r.running[number].Bytes {
		r.running[number] = n
	}
}

func minus(a, b segment.Totals) segment.Totals {
	return segment.Totals{
		Segments: a.Segments - b.Segments, Rows: a.Rows - b.Rows, Files: a.Files - b.Files, Bytes: a.Bytes - b.Bytes,
		Builds: a.Builds - b.Builds, Straddling: a.Straddling - b.Straddling,
	}
}

func (b *board) remove(key string) {
	switch {
	case strings.HasPrefix(key, keys.LimitsPrefix):
		if id, err := keys.LastID(key); err == nil && b.rows[id] != nil {
			b.rows[id].limits = Limits{}
		}
	case strings.HasPrefix(key, keys.JobPrefix):
		if id, err := keys.LastID(key); err == nil {
			delete(b.rows, id)
		}
	case strings.HasPrefix(key, keys.AllTasksPrefix):
		job, number, err := keys.LastTwo(key)
		if r := b.rows[job]; err == nil && r != nil {
			if t := r.tasks[number]; t != nil && t.state == TaskDone {
				r.done = minus(r.done, t.totals)
			}
			delete(r.tasks, number)
			delete(r.open, number)
			delete(r.running, number)
		}
	}
}

// workerHandler is the board as the handler of workers.
type workerHandler board

// Reset implements follow.Handler.
func (h *workerHandler) Reset(kvs []meta.KeyValue, _ int64) {
	b := (*board)(h)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pool, b.assigned = map[int64]*poolWorker{}, map[string]bool{}
	for _, kv := range kvs {
		b.putWorker(kv)
	}
	b.changed()
}

// Apply implements follow.Handler.
func (h *workerHandler) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	b := (*board)(h)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range events {
		switch {
		case !e.Deleted:
			b.putWorker(e.KV)
		case strings.HasPrefix(e.KV.Key, keys.WorkerPrefix):
			if id, err := keys.LastID(e.KV.Key); err == nil {
				delete(b.pool, id)
			}
		default:
			delete(b.assigned, e.KV.Key)
		}
	}
	b.changed()
}

func (b *board) putWorker(kv meta.KeyValue) {
	if strings.HasPrefix(kv.Key, keys.AssignedPrefix) {
		b.assigned[kv.Key] = true
		return
	}
	rec := &storagev1.Worker{}
	id, err := keys.LastID(kv.Key)
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		b.o.Log.Error("record of a worker is left alone", zap.String("key", kv.Key), zap.Error(err))
		return
	}
	b.pool[id] = &poolWorker{id: id, slots: int(rec.GetSlots()), lease: kv.Lease, create: kv.CreateRevision}
}

// job returns a job as it is known, nil if it is not.
func (b *board) job(id int64) *Job {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r := b.rows[id]; r != nil {
		return r.job
	}
	return nil
}

// note keeps an error that was met with a job, to be told.
func (b *board) note(job int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r := b.rows[job]; r != nil {
		r.lastErr = record.Clip(err.Error(), record.MaxText)
	}
}

// lastError is what was last met with a job.
func (b *board) lastError(job int64) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r := b.rows[job]; r != nil {
		return r.lastErr
	}
	return ""
}

// share is what one worker may use of a job's limits: they are divided among
// those that have tasks of it.
func (b *board) share(job int64) Limits {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.rows[job]
	if r == nil {
		return Limits{}
	}
	l := r.limits
	if l == (Limits{}) {
		return l
	}
	n := int64(max(1, b.workersOf(job)))
	if l.Requests > 0 {
		l.Requests = max(1, l.Requests/n)
	}
	if l.Bytes > 0 {
		l.Bytes = max(1, l.Bytes/n)
	}
	return l
}

// waitable returns a channel that is closed with the next change.
func (b *board) waitable() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.moved
}

// Status is a job with how far it has come.
type Status struct {
	Job       *Job
	Limits    Limits
	Done      segment.Totals
	Rate      int64         // bytes a second over the last half minute
	Remaining time.Duration // 0: not known
	Fraction  float64       // 1 only when it is COMPLETED
	LastError string
	Waiting   time.Time // since when it has waited for a store that does not answer; zero: it does not
	Refused   time.Time // since when a store has refused copies that are tried again; zero: it refuses none
	Retries   int64
}

// status is what is told of a job. The lock must be held.
func (b *board) status(r *row) *Status {
	job := r.job
	s := &Status{Job: job, Limits: r.limits, Done: job.Done, LastError: r.lastErr, Retries: job.Retries}
	if job.State == Completed {
		s.Done, s.Fraction, s.LastError = job.Totals, 1, ""
		return s
	}
	now := r.done
	for _, n := range r.running {
		now = plus(now, n)
	}
	r.shown = atLeast(atLeast(r.shown, now), job.Done)
	s.Done = r.shown
	if job.State.Ended() {
		s.LastError = ""
		return fraction(s)
	}
	if job.Phase != RollBack { // else the job has them already
		for _, t := range r.tasks {
			s.Retries += int64(max(1, t.attempt)) - 1
		}
	}
	if job.Phase == Copy {
		s.Waiting, _ = r.stall()
		s.Refused = r.refusedSince()
	}
	at := b.o.Now()
	r.samples = append(r.samples, sample{at, s.Done.Bytes})
	for len(r.samples) > 2 && at.Sub(r.samples[1].at) > rateSpan {
		r.samples = r.samples[1:]
	}
	if len(r.samples) > 1000 { // asked often: half of them say as much
		thin := r.samples[:0]
		for i := 0; i < len(r.samples); i += 2 {
			thin = append(thin, r.samples[i])
		}
		r.samples = thin
	}
	if first := r.samples[0]; at.After(first.at) && job.Phase == Copy {
		s.Rate = int64(float64(s.Done.Bytes-first.bytes) / at.Sub(first.at).Seconds())
		if s.Rate > 0 {
			s.Remaining = time.Duration(float64(job.Totals.Bytes-s.Done.Bytes) / float64(s.Rate) * float64(time.Second))
		}
	}
	return fraction(s)
}

// fraction fills in how far s is, short of the end.
func fraction(s *Status) *Status {
	if total := s.Job.Totals.Bytes + s.Job.Totals.Files; total > 0 {
		s.Fraction = min(0.999, float64(s.Done.Bytes+s.Done.Files)/float64(total))
	}
	return s
}

// atLeast returns the larger of each number.
func atLeast(a, b segment.Totals) segment.Totals {
	return segment.Totals{
		Segments: max(a.Segments, b.Segments), Rows: max(a.Rows, b.Rows), Files: max(a.Files, b.Files),
		Bytes: max(a.Bytes, b.Bytes), Builds: max(a.Builds, b.Builds), Straddling: max(a.Straddling, b.Straddling),
	}
}
