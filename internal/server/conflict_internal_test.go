package server

import (
	"context"
	"crypto/rand"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/codes"

	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
)

// contestedKV puts a job's record before each transaction, so that every compare of it fails.
type contestedKV struct {
	*memory.Store
	job *copyjob.Job
}

func (kv *contestedKV) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	put := meta.Put(keys.Job(kv.job.ID), kv.job.Encode("op"))
	if _, err := kv.Store.Txn(ctx, meta.Txn{Then: []meta.Op{put}}); err != nil {
		return meta.TxnResult{}, err
	}
	return kv.Store.Txn(ctx, t)
}

// TestJobConflicts checks that a CancelRestore and an UpdateRestore that lose every race
// end as ABORTED CONFLICT, which clients retry.
func TestJobConflicts(t *testing.T) {
	ctx := t.Context()
	kv := &contestedKV{
		Store: memory.New(memory.Options{}),
		job:   &copyjob.Job{ID: 7, State: copyjob.Executing, Phase: copyjob.Copy, CreateTime: time.Now()},
	}
	if _, err := kv.Txn(ctx, meta.Txn{}); err != nil {
		t.Fatal(err)
	}
	jobs := copyjob.New(copyjob.Options{KV: kv, Now: time.Now, Rand: rand.Reader, Log: zap.NewNop()})
	_, cancelErr := jobs.Cancel(ctx, kv.job.ID)
	_, limitsErr := jobs.SetLimits(ctx, kv.job.ID, copyjob.Limits{})
	for name, err := range map[string]error{"cancel": cancelErr, "set limits": limitsErr} {
		a := toStatusError(err, "id")
		if a.status.Code() != codes.Aborted || a.reason != "CONFLICT" {
			t.Errorf("%s: %v is %v %s, want %v CONFLICT", name, err, a.status.Code(), a.reason, codes.Aborted)
		}
	}
}
