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

// progressEvery is the shortest interval between two progress records of a task.
const progressEvery = time.Second

// progress counts the files of an attempt and records them from time to time.
type progress struct {
	attempt *attempt

	mu       sync.Mutex
	files    int64
	bytes    int64
	last     time.Duration // elapsed time of the last record
	advanced time.Time     // when files last exceeded that of all earlier attempts; zero: never
}

// finished returns the number of finished files, and when it last exceeded that of all
// earlier attempts.
func (p *progress) finished() (int64, time.Time) {
	if p == nil {
		return 0, time.Time{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.files, p.advanced
}

// add counts a file. A progress record that fails is dropped: the next one replaces it.
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
	value := record.Encode(&storagev1.TaskProgress{
		Format: record.Format, Attempt: a.attempt, Files: p.files, Bytes: p.bytes, FinishTime: record.Nanos(p.advanced),
	})
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, _ = a.worker.o.KV.Txn(ctx, meta.Txn{
		If:   []meta.Cond{a.job.unchanged(), a.assignment},
		Then: []meta.Op{meta.Put(keys.Progress(a.jobID, a.number), value)},
	})
}
