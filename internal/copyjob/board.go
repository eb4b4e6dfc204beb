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
const rateWindow = 30 * time.Second

// board is every job, task and worker in memory, kept current by watches. What
// is done about one is decided by the compares of a transaction.
type jobTable struct {
	o              *Options
	jobFollower    *follow.Follower
	workerFollower *follow.Follower
	wake           chan struct{} // size one; for the leader

	mu          sync.Mutex
	states      map[int64]*jobState
	workers     map[int64]*workerInfo
	assignments map[string]bool // assignment keys
	changed     chan struct{}   // closed and replaced with every change
}

// row is a job with its tasks.
type jobState struct {
	job        *Job // nil while only parts of it were seen
	tasks      map[int64]*task
	unfinished map[int64]*task          // those that are not done
	progress   map[int64]segment.Totals // files and bytes of tasks that are not done
	limits     Limits
	done       segment.Totals // sums of the tasks that are done
	reported   segment.Totals // the most that was ever told
	lastErr    string
	lastFinish time.Time // when an attempt last finished a file that none had before
	samples    []sample
}

// sample is how many bytes were done at a time.
type sample struct {
	at    time.Time
	bytes int64
}

// poolWorker is a worker that lives.
type workerInfo struct {
	id     int64
	slots  int
	lease  meta.LeaseID
	create int64
}

func newJobTable(o *Options) *jobTable {
	jt := &jobTable{o: o, wake: make(chan struct{}, 1), changed: make(chan struct{}), states: map[int64]*jobState{}}
	jt.workers, jt.assignments = map[int64]*workerInfo{}, map[string]bool{}
	from, to := meta.Prefix("/job/")
	jt.jobFollower = follow.New(follow.Options{KV: o.KV, From: from, To: to, Handler: (*jobHandler)(jt), Log: o.Log, Rand: o.Jitter})
	from, to = meta.Prefix("/worker/")
	jt.workerFollower = follow.New(follow.Options{KV: o.KV, From: from, To: to, Handler: (*workerHandler)(jt), Log: o.Log, Rand: o.Jitter})
	return jt
}

func (jt *jobTable) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return jt.jobFollower.Run(ctx) })
	group.Go(func() error { return jt.workerFollower.Run(ctx) })
	return group.Wait()
}

// sync waits until the board shows all that was written to jobs before the call.
func (jt *jobTable) sync(ctx context.Context) error {
	_, err := jt.jobFollower.Sync(ctx)
	return err
}

// changed tells those who wait. The lock must be held.
func (jt *jobTable) broadcast() {
	close(jt.changed)
	jt.changed = make(chan struct{})
	select {
	case jt.wake <- struct{}{}:
	default:
	}
}

// jobHandler is the board as the handler of jobs.
type jobHandler jobTable

// Reset implements follow.Handler.
func (h *jobHandler) Reset(kvs []meta.KeyValue, _ int64) {
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	old := jt.states
	jt.states = map[int64]*jobState{}
	for _, kv := range kvs {
		jt.put(kv)
	}
	for id, js := range jt.states { // what was told stays told
		if before := old[id]; before != nil {
			js.reported, js.samples = before.reported, before.samples
			for number, t := range js.tasks {
				if seen := before.tasks[number]; seen != nil && seen.revision == t.revision {
					t.seen = seen.seen
				}
			}
		}
	}
	jt.broadcast()
}

// Apply implements follow.Handler.
func (h *jobHandler) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	for _, e := range events {
		if e.Deleted {
			jt.remove(e.KV.Key)
		} else {
			jt.put(e.KV)
		}
	}
	jt.broadcast()
}

func (jt *jobTable) ensure(id int64) *jobState {
	js := jt.states[id]
	if js == nil {
		js = &jobState{tasks: map[int64]*task{}, unfinished: map[int64]*task{}, progress: map[int64]segment.Totals{}}
		jt.states[id] = js
	}
	return js
}

func (jt *jobTable) put(kv meta.KeyValue) {
	var err error
	switch {
	case strings.HasPrefix(kv.Key, keys.JobPrefix):
		var job *Job
		if job, err = DecodeJob(kv); err == nil {
			jt.ensure(job.ID).job = job
		}
	case strings.HasPrefix(kv.Key, keys.AllTasksPrefix):
		var t *task
		if t, err = decodeTask(kv); err == nil {
			t.seen = jt.o.Clock.Elapsed()
			jt.ensure(t.job).setTask(t)
		}
	case strings.HasPrefix(kv.Key, keys.AllProgressPrefix):
		var job, number int64
		rec := &storagev1.TaskProgress{}
		if job, number, err = keys.LastTwo(kv.Key); err == nil {
			if err = record.Decode(kv, rec); err == nil {
				jt.ensure(job).setProgress(number, segment.Totals{Files: rec.GetFiles(), Bytes: rec.GetBytes()})
				jt.ensure(job).lastFinish = latest(jt.ensure(job).lastFinish, record.Time(rec.GetFinishTime()))
			}
		}
	default:
		var id int64
		rec := &storagev1.JobLimits{}
		if id, err = keys.LastID(kv.Key); err == nil {
			if err = record.Decode(kv, rec); err == nil {
				jt.ensure(id).limits = Limits{Requests: rec.GetRequests(), Bytes: rec.GetBytes()}
			}
		}
	}
	if err != nil {
		jt.o.Log.Error("record of a restore is left alone", zap.String("key", kv.Key), zap.Error(err))
	}
}

func (js *jobState) setTask(t *task) {
	if old := js.tasks[t.number]; old != nil && old.state == TaskDone {
		js.done = subtractTotals(js.done, old.totals)
	}
	js.tasks[t.number], js.unfinished[t.number] = t, t
	js.lastFinish = latest(js.lastFinish, t.finishTime)
	if t.state == TaskDone {
		js.done = addTotals(js.done, t.totals)
		delete(js.progress, t.number)
		delete(js.unfinished, t.number)
	}
	if t.message != "" {
		js.lastErr = t.message
	}
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// stall returns since when the job has waited for a store that does not answer, and
// how long: up to the last attempt that got none. The time is zero while no task
// waits.
func (js *jobState) stall() (since time.Time, d time.Duration) {
	for _, t := range js.unfinished {
		if t.waits == 0 || t.refusals > 0 { // a refusal is an answer
			continue
		}
		from := latest(t.waitSince, js.lastFinish)
		if since.IsZero() || from.Before(since) {
			since = from
		}
		d = max(d, t.waitTime.Sub(from))
	}
	return since, d
}

// refusedSince returns since when a store has refused tasks of the job; zero: it
// refuses none.
func (js *jobState) refusedSince() (since time.Time) {
	for _, t := range js.unfinished {
		if t.refusals > 0 && (since.IsZero() || t.refuseSince.Before(since)) {
			since = t.refuseSince
		}
	}
	return since
}

// setRunning notes how far a task has come. Another attempt begins with what it
// finds, so that nothing goes down.
func (js *jobState) setProgress(number int64, n segment.Totals) {
	if t := js.tasks[number]; t != nil && t.state == TaskDone {
		return
	}
	if n.Bytes >= js.progress[number].Bytes {
		js.progress[number] = n
	}
}

func subtractTotals(a, b segment.Totals) segment.Totals {
	return segment.Totals{
		Segments: a.Segments - b.Segments, Rows: a.Rows - b.Rows, Files: a.Files - b.Files, Bytes: a.Bytes - b.Bytes,
		Builds: a.Builds - b.Builds, Straddling: a.Straddling - b.Straddling,
	}
}

func (jt *jobTable) remove(key string) {
	switch {
	case strings.HasPrefix(key, keys.LimitsPrefix):
		if id, err := keys.LastID(key); err == nil && jt.states[id] != nil {
			jt.states[id].limits = Limits{}
		}
	case strings.HasPrefix(key, keys.JobPrefix):
		if id, err := keys.LastID(key); err == nil {
			delete(jt.states, id)
		}
	case strings.HasPrefix(key, keys.AllTasksPrefix):
		job, number, err := keys.LastTwo(key)
		if js := jt.states[job]; err == nil && js != nil {
			if t := js.tasks[number]; t != nil && t.state == TaskDone {
				js.done = subtractTotals(js.done, t.totals)
			}
			delete(js.tasks, number)
			delete(js.unfinished, number)
			delete(js.progress, number)
		}
	}
}

// workerHandler is the board as the handler of workers.
type workerHandler jobTable

// Reset implements follow.Handler.
func (h *workerHandler) Reset(kvs []meta.KeyValue, _ int64) {
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	jt.workers, jt.assignments = map[int64]*workerInfo{}, map[string]bool{}
	for _, kv := range kvs {
		jt.putWorker(kv)
	}
	jt.broadcast()
}

// Apply implements follow.Handler.
func (h *workerHandler) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	for _, e := range events {
		switch {
		case !e.Deleted:
			jt.putWorker(e.KV)
		case strings.HasPrefix(e.KV.Key, keys.WorkerPrefix):
			if id, err := keys.LastID(e.KV.Key); err == nil {
				delete(jt.workers, id)
			}
		default:
			delete(jt.assignments, e.KV.Key)
		}
	}
	jt.broadcast()
}

func (jt *jobTable) putWorker(kv meta.KeyValue) {
	if strings.HasPrefix(kv.Key, keys.AssignedPrefix) {
		jt.assignments[kv.Key] = true
		return
	}
	rec := &storagev1.Worker{}
	id, err := keys.LastID(kv.Key)
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		jt.o.Log.Error("record of a worker is left alone", zap.String("key", kv.Key), zap.Error(err))
		return
	}
	jt.workers[id] = &workerInfo{id: id, slots: int(rec.GetSlots()), lease: kv.Lease, create: kv.CreateRevision}
}

// job returns a job as it is known, nil if it is not.
func (jt *jobTable) job(id int64) *Job {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	if js := jt.states[id]; js != nil {
		return js.job
	}
	return nil
}

// note keeps an error that was met with a job, to be told.
func (jt *jobTable) setLastError(job int64, err error) {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	if js := jt.states[job]; js != nil {
		js.lastErr = record.Clip(err.Error(), record.MaxText)
	}
}

// lastError is what was last met with a job.
func (jt *jobTable) lastError(job int64) string {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	if js := jt.states[job]; js != nil {
		return js.lastErr
	}
	return ""
}

// share is what one worker may use of a job's limits: they are divided among
// those that have tasks of it.
func (jt *jobTable) rateShare(job int64) Limits {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	js := jt.states[job]
	if js == nil {
		return Limits{}
	}
	l := js.limits
	if l == (Limits{}) {
		return l
	}
	n := int64(max(1, jt.workersOf(job)))
	if l.Requests > 0 {
		l.Requests = max(1, l.Requests/n)
	}
	if l.Bytes > 0 {
		l.Bytes = max(1, l.Bytes/n)
	}
	return l
}

// waitable returns a channel that is closed with the next change.
func (jt *jobTable) nextChange() <-chan struct{} {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	return jt.changed
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
func (jt *jobTable) status(js *jobState) *Status {
	job := js.job
	s := &Status{Job: job, Limits: js.limits, Done: job.Done, LastError: js.lastErr, Retries: job.Retries}
	if job.State == Completed {
		s.Done, s.Fraction, s.LastError = job.Totals, 1, ""
		return s
	}
	now := js.done
	for _, n := range js.progress {
		now = addTotals(now, n)
	}
	js.reported = maxTotals(maxTotals(js.reported, now), job.Done)
	s.Done = js.reported
	if job.State.Ended() {
		s.LastError = ""
		return fraction(s)
	}
	if job.Phase != RollBack { // else the job has them already
		for _, t := range js.tasks {
			s.Retries += int64(max(1, t.attempt)) - 1
		}
	}
	if job.Phase == Copy {
		s.Waiting, _ = js.stall()
		s.Refused = js.refusedSince()
	}
	at := jt.o.Now()
	js.samples = append(js.samples, sample{at, s.Done.Bytes})
	for len(js.samples) > 2 && at.Sub(js.samples[1].at) > rateWindow {
		js.samples = js.samples[1:]
	}
	if len(js.samples) > 1000 { // asked often: half of them say as much
		thin := js.samples[:0]
		for i := 0; i < len(js.samples); i += 2 {
			thin = append(thin, js.samples[i])
		}
		js.samples = thin
	}
	if first := js.samples[0]; at.After(first.at) && job.Phase == Copy {
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
func maxTotals(a, b segment.Totals) segment.Totals {
	return segment.Totals{
		Segments: max(a.Segments, b.Segments), Rows: max(a.Rows, b.Rows), Files: max(a.Files, b.Files),
		Bytes: max(a.Bytes, b.Bytes), Builds: max(a.Builds, b.Builds), Straddling: max(a.Straddling, b.Straddling),
	}
}
