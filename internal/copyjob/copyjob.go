// Package copyjob restores snapshots: durable jobs that copy the files of a
// snapshot and publish them as a new collection, or leave nothing.
//
// # Words
//
//	job         a restore. Its record changes with state and phase only
//	task        a range of the snapshot's segments. Its record changes with its
//	            state only; how far it has come is kept beside it
//	attempt     one run of a task by one worker
//	worker      a part of a replica that takes tasks; it is there as long as its
//	            lease
//	assignment  the key that gives an attempt to a worker, under that worker's
//	            lease
//	claim       the RESTORING collection, and the name key that leads to it: they
//	            are the collection's own keys, so that whoever wants the name
//	            loses by the same compare
//
// # States
//
//	        admit            begin              publish
//	none ----------> PENDING -----> EXECUTING ---------> COMPLETED
//	                    |            prepare, copy
//	                    |               |
//	                    +-----+---------+
//	                  give up | (failed, canceled, out of time)
//	                          v              all removed
//	                   EXECUTING, roll back ------------> FAILED, CANCELED
//
//	task    PENDING -> RUNNING -> DONE; back to PENDING after an error that may
//	        pass, and after a refusal by the store; FAILED after an error that will
//	        not, and after refusals in a row for the refusal timeout (classify.go)
//
// # Transactions
//
// Each but the first compares the job's record as it was read; those of the
// leader its election key as well, and those of a worker its very assignment.
//
//	admit     compares: snapshot as read (COMMITTED), target's name and id
//	          absent, request token absent
//	          puts: claim, job PENDING, durable pin, token with the job's id. All
//	          target ids are allocated before it
//	begin     puts: job EXECUTING in phase prepare
//	prepare   (nothing lies where the target's objects will) several; puts: partitions, indexes, checkpoints, tasks. Their keys
//	          and values follow from the job and the snapshot, so to repeat is
//	          harmless
//	copy      puts: job in phase copy. What was prepared was read back before
//	assign    compares: task as read, worker there, its last assignment absent
//	          puts: task RUNNING with the next attempt, assignment
//	register  several when the segments are many; puts: target segments
//	done      compares: task as read. Puts: the last segments, task DONE;
//	          deletes: assignment
//	failed    compares: task as read. Puts: task PENDING (later) or FAILED, with
//	          its failures, waits and refusals; deletes: assignment
//	publish   (all tasks are DONE, and their sums are the job's) puts: job
//	          COMPLETED, collection ACTIVE, result under the token; deletes: pin,
//	          tasks
//	give up   puts: job in phase roll back with the state it ends in. It needs no
//	          leader: cancel is one
//	end       (all assignments are gone, all objects and catalog keys removed)
//	          puts: job FAILED or CANCELED, result under the token; deletes:
//	          collection, name, pin, tasks
//
// Give up and publish compare the same record: the one excludes the other. No
// object is deleted before the first, and nothing has ended before end.
//
// # Failures
//
//	no answer to any of them  the loop reads what there is and decides anew; all
//	                          of them can be found by what they put
//	leader dies, is deposed   another goes on from the records; the old one's
//	                          writes fail on the election key
//	worker dies               its assignments go with its lease; the task is
//	                          assigned again with the next attempt
//	worker is cut off         it stops by its own clock before its lease ends, so
//	                          that nothing of it comes after what others do then
//	worker freezes            as when it dies. What it copies late are the same
//	                          bytes to the same keys, or lies under ids that have
//	                          ended: before the job's record goes, what lies there
//	                          without a record is removed
//	object altered between    FAILED, also without a registered ETag: the
//	attempts                  first attempt's is kept (pins.go)
//	object missing, altered   FAILED, which gives the job up with its name
//	object has an ETag of     FAILED, by a reason of its own: the copy is refused,
//	another layout            and [object.Compare] does not find another content
//	manifest altered          as when the store does not answer: it may be the way.
//	                          At the cap of failures the snapshot is corrupt
//	store does not answer     the task goes back and is tried later, with longer
//	                          pauses, until the job's deadline, or until no file
//	                          was finished for a day: it has stalled (classify.go)
//	store refuses: expired    likewise, until the task was refused for the refusal
//	token, lack of a right,   timeout in a row; then FAILED by the store's reason.
//	clock skew, key service,  A worker or leader that dies in between changes
//	bucket not known          nothing: the record counts the refusals
//	store answers with an     likewise, up to the cap of failures
//	error that may pass
//	store refuses the         FAILED at once: the store lacks a call, the request
//	request for good          or the key is invalid
//	roll back fails           it is tried again until all is gone; the claim stays
//	                          until then
//	replica stops             as when it dies, but its lease is ended at once
package copyjob

import (
	"context"
	"errors"
	"io"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// Errors that callers tell apart.
var (
	ErrJobNotFound = errors.New("restore job not found")
	ErrEnded       = errors.New("restore has ended")
)

// Source reads what a snapshot captured. Its errors that wrap ErrSource will not
// pass, and those that wrap ErrDigest may.
type Source interface {
	// Metadata returns what the snapshot says of itself and its collection.
	Metadata(ctx context.Context, snapshot int64) (*manifest.Metadata, error)
	// Manifest returns the segments of one of its manifests.
	Manifest(ctx context.Context, snapshot int64, number int) ([]segment.Segment, error)
}

// Errors of a Source.
var (
	// ErrSource means that a snapshot cannot be read and never will be.
	ErrSource = errors.New("the snapshot cannot be read")
	// ErrDigest means that what was read of a snapshot is not what was written. The
	// way may be to blame, so it is read again, up to the cap of failures.
	ErrDigest = errors.New("not as it was written")
)

// Options are what Jobs need.
type Options struct {
	KV       meta.KV
	Catalog  *catalog.Catalog
	Source   Source
	Stores   map[string]object.Store // by alias
	PinStore string                  // alias of the store that keeps the pins of sources
	Requests *request.Leases
	Replica  string
	Now      func() time.Time
	// Clock judges deadlines, and measures the time between two tries. Nil: one over
	// Now, without another clock to compare it with.
	Clock *clock.Trusted
	Rand  io.Reader
	Log   *zap.Logger

	Slots        int           // tasks that this replica works on at once; default 8; negative: none
	CopyInFlight int           // objects that it copies at once; default 32
	WorkerTTL    time.Duration // of a worker's lease; default 10 s
	Resync       time.Duration // between looks that nothing asked for; default 30 s
	MaxFailures  int           // of a task before the job is given up; default 12, about five minutes
	StallTimeout time.Duration // how long a job waits for a store without a file finished; default a day
	// RefusalTimeout is how long a task that the store refuses is tried again, by a
	// refusal that may pass, before the job is given up. Default: 5 minutes.
	RefusalTimeout time.Duration
	Keep           time.Duration // how long jobs that have ended are kept; default a week
	// Deleted is told of objects of jobs that were deleted, and of their bytes; for
	// metrics. Nil: nobody is.
	Deleted func(objects, bytes int64)
	// Jitter spreads attempts: numbers in [0, 1). Default that of [meta.Backoff].
	Jitter func() float64
	// Ready are channels. This replica takes no tasks before all are closed.
	Ready []<-chan struct{}
}

// Jobs runs restores. It is safe for concurrent use. All background work happens
// inside Run and Lead.
type Jobs struct {
	o      Options
	kv     meta.KV
	log    *zap.Logger
	table  *jobTable
	worker *worker
}

// New returns Jobs that do nothing until Run.
func New(o Options) *Jobs {
	if o.Slots == 0 {
		o.Slots = 8
	}
	if o.CopyInFlight == 0 {
		o.CopyInFlight = 32
	}
	if o.WorkerTTL == 0 {
		o.WorkerTTL = 10 * time.Second
	}
	if o.Resync == 0 {
		o.Resync = 30 * time.Second
	}
	if o.MaxFailures == 0 {
		o.MaxFailures = 12
	}
	if o.StallTimeout == 0 {
		o.StallTimeout = 24 * time.Hour
	}
	if o.RefusalTimeout == 0 {
		o.RefusalTimeout = 5 * time.Minute
	}
	if o.Keep == 0 {
		o.Keep = 7 * 24 * time.Hour
	}
	if o.Deleted == nil {
		o.Deleted = func(int64, int64) {}
	}
	if o.Clock == nil {
		o.Clock = clock.New(clock.Options{KV: o.KV, Clock: clock.Of(o.Now), Replica: o.Replica, Log: o.Log})
	}
	j := &Jobs{o: o, kv: o.KV, log: o.Log}
	j.table = newJobTable(&j.o)
	j.worker = newWorker(&j.o, j.table)
	return j
}

// Run follows the jobs, and works on the tasks that this replica is given, until
// ctx ends. It must be called once.
func (j *Jobs) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return j.table.run(ctx) })
	if j.o.Slots > 0 {
		group.Go(func() error {
			j.worker.run(ctx)
			return nil
		})
	}
	return group.Wait()
}

// Lead moves the jobs on until ctx ends or another leads.
func (j *Jobs) Lead(ctx context.Context, term election.Term) error {
	return newLeader(j, term).run(ctx)
}
