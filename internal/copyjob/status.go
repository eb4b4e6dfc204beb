package copyjob

import (
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// rateWindow is the time over which a job's rate is measured.
const rateWindow = 30 * time.Second

// Status is a job with its progress.
type Status struct {
	Job       *Job
	Limits    Limits
	Done      segment.Totals
	Rate      int64         // bytes per second over the last half minute
	Remaining time.Duration // 0: unknown
	Fraction  float64       // 1 only when it is COMPLETED
	LastError string
	Waiting   time.Time // start of the wait for a store that does not answer; zero: no wait
	Refused   time.Time // first refusal of copies that are tried again; zero: no refusal
	Retries   int64
}

// sameProgress reports whether two reports of one record are equal to a watcher.
func (s *Status) sameProgress(o *Status) bool {
	return s.Done == o.Done && s.LastError == o.LastError && s.Waiting.Equal(o.Waiting) && s.Refused.Equal(o.Refused)
}

// statusOf returns the status of a cached job, nil if it is unknown, and a channel that is
// closed at the next change.
func (jt *jobTable) statusOf(id int64) (*Status, <-chan struct{}) {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	js := jt.states[id]
	if js == nil || js.job == nil {
		return nil, jt.changed
	}
	return jt.status(js), jt.changed
}

// sample is the number of bytes done at a time.
type sample struct {
	at    time.Time
	bytes int64
}

// status returns the status of a job. The lock must be held.
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
	if job.Phase != RollBack { // from give up on, the job's record has them
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
	if len(js.samples) > 1000 { // frequent calls: every second sample is enough
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

// fraction sets the completed fraction, which stays below 1.
func fraction(s *Status) *Status {
	if total := s.Job.Totals.Bytes + s.Job.Totals.Files; total > 0 {
		s.Fraction = min(0.999, float64(s.Done.Bytes+s.Done.Files)/float64(total))
	}
	return s
}
