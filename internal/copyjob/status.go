package copyjob

import (
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// rateSpan is how long back a job's rate is taken.
const rateWindow = 30 * time.Second

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

// statusOf returns a job as the board has it, nil when it does not, and a channel
// that is closed when anything changes.
func (jt *jobTable) statusOf(id int64) (*Status, <-chan struct{}) {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	js := jt.states[id]
	if js == nil || js.job == nil {
		return nil, jt.changed
	}
	return jt.status(js), jt.changed
}

// sample is how many bytes were done at a time.
type sample struct {
	at    time.Time
	bytes int64
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
