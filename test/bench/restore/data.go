//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

const (
	firstField = 100
	fieldCount = 12
	rows       = 100_000

	// firstTimestamp is in the form of a hybrid clock: milliseconds, and 18 bits
	// of a counter.
	firstTimestamp = uint64(1_790_000_000_000) << 18
	lastTimestamp  = firstTimestamp + 1<<40
)

// captured is a collection with files in the store, and its snapshot.
type captured struct {
	prefix   string // of its root
	set      string // the floor's name of the files
	dir      string // of the files, below prefix
	files    int
	bytes    int64
	snapshot int64
}

// capture creates a collection of segments with files files of a size each, written
// to s3, and takes a snapshot of it.
func (e *env) capture(ctx context.Context, s3 string, segments, files int, size int64) (*captured, error) {
	name := e.Name()
	c := &captured{prefix: "data/" + name + "/", set: name, files: segments * files, bytes: int64(segments*files) * size}
	made, err := e.client.Catalog.CreateCollection(ctx, &snapshotdv1.CreateCollectionRequest{
		Name: &snapshotdv1.CollectionName{Name: name}, Channels: []string{name + "-0"},
		Roots:        []*snapshotdv1.Root{{Prefix: c.prefix}},
		RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	ref := &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: made.GetCollection().GetId()}}
	p, err := e.client.Catalog.CreatePartition(ctx, &snapshotdv1.CreatePartitionRequest{
		Collection: ref, Name: "p", RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	ids, err := e.client.Catalog.AllocateIds(ctx, &snapshotdv1.AllocateIdsRequest{
		Want: &snapshotdv1.AllocateIdsRequest_Count{Count: int64(segments)}, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	c.dir = fmt.Sprintf("%d/%d", ref.GetId(), p.GetPartition().GetId())
	var list []*snapshotdv1.Segment
	var paths []string
	for i := range segments {
		id := ids.GetIds().GetFirst() + int64(i)
		s := &snapshotdv1.Segment{
			Id:          id,
			PartitionId: p.GetPartition().GetId(),
			Rows:        rows,
			StartPosition: &snapshotdv1.Position{
				Timestamp: firstTimestamp,
			},
			DmlPosition: &snapshotdv1.Position{Timestamp: lastTimestamp},
		}
		for n := range files {
			field, log := int64(firstField+n%fieldCount), id*64+int64(n)
			s.Files = append(s.Files, &snapshotdv1.File{
				Path: fmt.Sprintf(
					"%s/%d/insert/%d/%d",
					c.dir,
					id,
					field,
					log,
				),
				Kind:         "insert",
				FieldId:      field,
				LogId:        log,
				SizeBytes:    size,
				MinTimestamp: firstTimestamp,
				MaxTimestamp: lastTimestamp - 1,
				Entries:      rows,
			})
			paths = append(paths, s.Files[n].GetPath())
		}
		list = append(list, s)
	}
	put, err := e.floor.do(ctx, job{Op: "put", S3: s3, Set: c.set, Prefix: c.prefix, Keys: paths, Size: size})
	if err != nil {
		return nil, err
	}
	for i, etag := range put.ETags {
		list[i/files].Files[i%files].Etag = etag
	}
	if err := e.register(ctx, ref, list); err != nil {
		return nil, err
	}
	if _, err := e.client.Catalog.SetCheckpoints(ctx, &snapshotdv1.SetCheckpointsRequest{
		Collection:  ref,
		Checkpoints: []*snapshotdv1.ChannelPosition{{Position: &snapshotdv1.Position{Timestamp: lastTimestamp}}},
	}); err != nil {
		return nil, err
	}
	s, err := e.client.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
		Collection: ref, Name: name, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	if got := s.GetSnapshot().GetTotals().GetFiles(); got != int64(c.files) {
		return nil, fmt.Errorf("a snapshot of %d files, not %d", got, c.files)
	}
	c.snapshot = s.GetSnapshot().GetId()
	return c, nil
}

func (e *env) register(ctx context.Context, ref *snapshotdv1.CollectionRef, list []*snapshotdv1.Segment) error {
	stream, err := e.client.Catalog.AddSegments(ctx)
	if err != nil {
		return err
	}
	const perMessage = 50
	for from := 0; from < len(list); from += perMessage {
		part := list[from:min(from+perMessage, len(list))]
		if err := stream.Send(&snapshotdv1.AddSegmentsRequest{Collection: ref, Segments: part}); err != nil {
			break // CloseAndRecv returns the cause
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

// restore restores a snapshot. It returns the seconds from the call until etcd shows
// the job as COMPLETED, and the id of the new collection.
func (e *env) restore(ctx context.Context, c *captured) (seconds float64, target int64, err error) {
	ended, err := watchJobs(ctx, e.kv)
	if err != nil {
		return 0, 0, err
	}
	defer ended.stop()
	begin := time.Now()
	resp, err := e.client.Snapshots.RestoreSnapshot(ctx, &snapshotdv1.RestoreSnapshotRequest{
		Snapshot: &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Id{Id: c.snapshot}},
		Target:   &snapshotdv1.CollectionName{Name: e.Name()}, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return 0, 0, err
	}
	job, at, err := ended.wait(ctx, resp.GetJobId())
	if err != nil {
		return 0, 0, err
	}
	if job.State != copyjob.Completed || job.Done.Files != int64(c.files) {
		return 0, 0, fmt.Errorf(
			"restore job %v is %v with %d of %d files: %s %s",
			job,
			job.State,
			job.Done.Files,
			c.files,
			job.Reason,
			job.Message,
		)
	}
	return at.Sub(begin).Seconds(), resp.GetCollectionId(), nil
}

// jobsEnd reports ended jobs by a watch of etcd.
type jobsEnd struct {
	stop func()
	jobs chan endedJob
	errs chan error
}

type endedJob struct {
	job *copyjob.Job
	at  time.Time
}

func watchJobs(ctx context.Context, kv meta.KV) (*jobsEnd, error) {
	_, _, revision, err := kv.Get(ctx, keys.Job(0))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	e := &jobsEnd{stop: cancel, jobs: make(chan endedJob, 16), errs: make(chan error, 1)}
	from, to := meta.Prefix(keys.JobPrefix)
	w := kv.Watch(ctx, from, to, revision)
	go func() {
		for {
			batch, err := w.Next()
			at := time.Now()
			if err != nil {
				e.errs <- err
				return
			}
			for _, event := range batch.Events {
				if event.Deleted {
					continue
				}
				if job, err := copyjob.DecodeJob(event.KV); err == nil && job.State.Ended() {
					e.jobs <- endedJob{job, at}
				}
			}
		}
	}()
	return e, nil
}

func (e *jobsEnd) wait(ctx context.Context, id int64) (*copyjob.Job, time.Time, error) {
	for {
		select {
		case <-ctx.Done():
			return nil, time.Time{}, context.Cause(ctx)
		case err := <-e.errs:
			return nil, time.Time{}, err
		case j := <-e.jobs:
			if j.job.ID == id {
				return j.job, j.at, nil
			}
		}
	}
}

// discard counts the files below a prefix in versitygw's directory, and removes
// them.
func (e *env) discard(prefix string, want int) error {
	dir, n := e.objects(prefix), 0
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			n++
		}
		return err
	})
	if err == nil && n != want {
		err = fmt.Errorf("%d objects below %s, not %d", n, prefix, want)
	}
	return errors.Join(err, os.RemoveAll(strings.TrimSuffix(dir, "/")))
}
