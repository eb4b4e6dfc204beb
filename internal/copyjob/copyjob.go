// Package copyjob restores snapshots. A restore is a durable job that copies the
// files of a snapshot and publishes them as a new collection, or removes everything
// that it made.
//
// # Words
//
//	job         a restore. Its record changes with its state and phase only
//	task        a range of the snapshot's segments. Its record changes with its
//	            state only; its progress has a key beside it
//	attempt     one run of a task by one worker
//	worker      the part of a replica that runs tasks; it exists as long as its
//	            lease
//	assignment  the key that gives an attempt to a worker, under the worker's lease
//	target      the RESTORING collection and its name key. They are the collection's
//	            ordinary keys, so a create of the same name loses by the same
//	            compare
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
//	        pass, and after a refusal by the store; FAILED after a permanent error,
//	        and after consecutive refusals for the refusal timeout (classify.go)
//
// # Transactions
//
// Each but the first compares the job's record with the version that was read.
// Those of the leader also compare its election key, and those of a worker its
// assignment.
//
//	admit     compares: snapshot as read (COMMITTED), target's name and id
//	          absent, request token absent
//	          puts: target, job PENDING, durable pin, token with the job's id. All
//	          target ids are allocated before it
//	begin     puts: job EXECUTING in phase prepare
//	prepare   (no object exists under the target's prefixes) several; puts:
//	          partitions, indexes, checkpoints, tasks. Their keys and values follow
//	          from the job and the snapshot, so a repeat is harmless
//	copy      (everything that was prepared is read back) puts: job in phase copy
//	assign    compares: task as read, worker exists, its last assignment absent
//	          puts: task RUNNING with the next attempt, assignment
//	register  several when the segments are many; puts: target segments
//	done      compares: task as read. Puts: the last segments, task DONE;
//	          deletes: assignment
//	failed    compares: task as read. Puts: task PENDING (later) or FAILED, with
//	          its failures, waits and refusals; deletes: assignment
//	publish   (all tasks are DONE, and their sums are the job's) puts: job
//	          COMPLETED, collection ACTIVE, result under the token; deletes: pin,
//	          tasks
//	give up   puts: job in phase roll back with its outcome. It needs no leader:
//	          cancel is one
//	end       (all assignments are gone, all objects and catalog keys removed)
//	          puts: job FAILED or CANCELED, result under the token; deletes:
//	          collection, name, pin, tasks
//
// Give up and publish compare the same record, so each excludes the other. No object
// is deleted before give up, and no job is FAILED or CANCELED before end.
//
// # Failures
//
//	any transaction is not    the loop reads the current state and decides again;
//	answered                  what each one puts shows whether it took effect
//	leader dies, is deposed   the next leader continues from the records; writes of
//	                          the old one fail on the election key
//	worker dies               its assignments expire with its lease; the task is
//	                          assigned again with the next attempt
//	worker is cut off         it stops by its own clock before its lease expires, so
//	                          its last request precedes those of the next attempt
//	worker freezes            as when it dies. Its late copies write the same bytes
//	                          to the same keys, or to keys of ids that have ended:
//	                          before the job's record is removed, objects there
//	                          without a record are deleted
//	object altered between    FAILED, also without a registered ETag: the ETag of the
//	attempts                  first attempt is kept (pins.go)
//	object missing, altered   FAILED, and the job is given up with the object's name
//	object has an ETag of     FAILED, by a reason of its own: the copy is refused,
//	another layout            and [object.Compare] does not find another content
//	manifest altered          as when the store does not answer: a transfer error is
//	                          possible. At the cap of failures the snapshot is
//	                          corrupt
//	store does not answer     the task goes back and is tried later, with longer
//	                          pauses, until the job's deadline, or until no file was
//	                          finished for a day: the job has stalled (classify.go)
//	store refuses: expired    likewise, until the task was refused for the refusal
//	token, missing right,     timeout without interruption; then FAILED by the
//	clock skew, key service,  store's reason. A worker or leader that dies in between
//	unknown bucket            changes nothing: the record counts the refusals
//	store answers with an     likewise, up to the cap of failures
//	error that may pass
//	store refuses the         FAILED at once: the store lacks a call, the request or
//	request permanently       the key is invalid
//	roll back fails           it is repeated until everything is removed; the target
//	                          stays until then
//	replica stops             as when it dies, but its lease is revoked at once
package copyjob

import (
	"context"
	"errors"
	"io"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// Errors that callers distinguish.
var (
	ErrJobNotFound = errors.New("restore job not found")
	ErrEnded       = errors.New("restore has ended")
)

// Options configure Jobs.
type Options struct {
	KV        meta.KV
	Catalog   *catalog.Catalog
	Snapshots *snapshot.Reader
	Stores    map[string]object.Store // by alias
	PinStore  string                  // alias of the store with the pins of sources
	Requests  *request.Leases
	Replica   string
	Now       func() time.Time
	// Clock judges deadlines, and measures the time between two attempts. Nil: one over
	// Now, without another clock to compare it with.
	Clock *clock.Trusted
	Rand  io.Reader
	Log   *zap.Logger

	Slots        int           // concurrent tasks of this replica; default 8; negative: none
	CopyInFlight int           // concurrent copies of this replica; default 32
	WorkerTTL    time.Duration // lifetime of a worker's lease; default 10 s
	Resync       time.Duration // longest time between two passes of the leader; default 30 s
	MaxFailures  int           // of a task before the job is given up; default 12, about five minutes
	StallTimeout time.Duration // longest wait for a store without a finished file; default a day
	// RefusalTimeout is how long a task is tried again while the store refuses it in a
	// way that may pass, before the job is given up. Default: 5 minutes.
	RefusalTimeout time.Duration
	Keep           time.Duration // how long ended jobs are kept; default a week
	// Deleted is called with the number and the bytes of deleted objects of jobs, for
	// metrics. Nil: not called.
	Deleted func(objects, bytes int64)
	// Jitter spreads attempts: numbers in [0, 1). Default that of [meta.Backoff].
	Jitter func() float64
	// Problems receives repeated failures. Default: a new list.
	Problems *lasting.Problems
	// Ready are channels. This replica runs no tasks until all are closed.
	Ready []<-chan struct{}
}

// Jobs manages restores. It is safe for concurrent use. All background work happens inside
// Run and Lead.
type Jobs struct {
	o      Options
	kv     meta.KV
	log    *zap.Logger
	table  *jobTable
	worker *worker

	assigning *lasting.Problem // of the leader
}

// New returns Jobs that are idle until Run.
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
	if o.Problems == nil {
		o.Problems = lasting.New(o.Now)
	}
	if o.Clock == nil {
		o.Clock = clock.New(clock.Options{KV: o.KV, Clock: clock.Of(o.Now), Replica: o.Replica, Log: o.Log})
	}
	j := &Jobs{o: o, kv: o.KV, log: o.Log}
	j.table = newJobTable(&j.o)
	j.worker = newWorker(&j.o, j.table)
	j.assigning = o.Problems.Add(o.Log, "restore assignment", "assignment of restore tasks failed, retrying", "")
	return j
}

// Run mirrors the jobs and runs the tasks that are assigned to this replica, until ctx
// ends. It must be called once.
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

// Lead advances the jobs until ctx ends or the term is over.
func (j *Jobs) Lead(ctx context.Context, term election.Term) error {
	return newLeader(j, term).run(ctx)
}
