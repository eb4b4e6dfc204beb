package copyjob

import (
	"context"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// progressEvery is how often a task says how far it has come, at most.
const progressEvery = time.Second

// progress says from time to time how far an attempt has come.
type progress struct {
	attempt *attempt

	mu       sync.Mutex
	files    int64
	bytes    int64
	last     time.Duration // elapsed
	advanced time.Time     // when it last finished more files than any attempt before; zero: it has not
}

// finished returns how many files the attempt has finished, and when that last was
// more than any attempt before had.
func (p *progress) finished() (int64, time.Time) {
	if p == nil {
		return 0, time.Time{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.files, p.advanced
}

// add counts a file. It is never an error that nobody could be told.
func (p *progress) add(ctx context.Context, bytes int64) {
	p.mu.Lock()
	p.files++
	p.bytes += bytes
	a, now := p.attempt, p.attempt.worker.o.Clock.Elapsed()
	if p.files > a.task.finished {
		p.advanced = a.worker.o.Clock.Display()
	}
	if now-p.last < progressEvery {
		p.mu.Unlock()
		return
	}
	p.last = now
	value := record.Encode(&storagev1.TaskProgress{Format: record.Format, Attempt: a.attempt, Files: p.files, Bytes: p.bytes, FinishTime: record.Nanos(p.advanced)})
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, _ = a.worker.o.KV.Txn(ctx, meta.Txn{
		If:   []meta.Cond{a.job.unchanged(), a.assignment},
		Then: []meta.Op{meta.Put(keys.Progress(a.jobID, a.number), value)},
	})
}
