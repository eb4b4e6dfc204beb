//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	collectionName = "soak"
	prefix         = "soak/"
	liveSegments   = 36              // segments of the collection at the end of a round
	idleTimeout    = time.Minute     // until no work is left
	pollEvery      = time.Second / 4 // for the end of the work
	stableFor      = 2500 * time.Millisecond
	idBatch        = 1000
)

// engine is the writer of segments. Its operations run one at a time.
type engine struct {
	mu         sync.Mutex
	collection int64
	partition  int64
	ids, last  int64 // the unused allocated ids: from ids to last
	created    int   // segments of the partition
	live       []int64
	retained   []string // snapshots that outlive a round
}

func (eng *engine) ref() *api.CollectionRef {
	return &api.CollectionRef{Ref: &api.CollectionRef_Id{Id: eng.collection}}
}

func collectionRef(name string) *api.CollectionRef {
	return &api.CollectionRef{Ref: &api.CollectionRef_Name{Name: &api.CollectionName{Name: name}}}
}

// segments returns the segments of the collection.
func (eng *engine) segments(ctx context.Context, c *client.Client) ([]*api.Segment, error) {
	stream, err := c.Catalog.ExportSegments(ctx, &api.ExportSegmentsRequest{Collection: eng.ref()})
	var list []*api.Segment
	for err == nil {
		var m *api.ExportSegmentsResponse
		m, err = stream.Recv()
		list = append(list, m.GetSegments()...)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return list, err
}

// prepare creates the collection.
func (e *env) prepare(ctx context.Context) error {
	c := e.replicas[0].Load().client
	made, err := c.Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
		Name: &api.CollectionName{Name: collectionName}, Roots: []*api.Root{{Prefix: prefix}},
	})
	if err != nil {
		return err
	}
	e.engine.collection = made.GetCollection().GetId()
	p, err := c.Catalog.CreatePartition(ctx, &api.CreatePartitionRequest{Collection: e.engine.ref(), Name: "p"})
	e.engine.partition = p.GetPartition().GetId()
	return err
}

// retry repeats a call, on one replica after the other, while it fails with a
// transient error.
func (e *env) retry(ctx context.Context, call func(*client.Client) error) error {
	for n := 0; ; n++ {
		err := call(e.replicas[n%replicas].Load().client)
		switch status.Code(err) {
		case codes.Unavailable, codes.Aborted, codes.ResourceExhausted:
		default:
			return err
		}
		if bench.Wait(ctx, pollEvery) != nil {
			return err
		}
	}
}

// newID returns an unused id.
func (w *worker) newID(ctx context.Context) (int64, error) {
	eng := &w.engine
	if eng.ids == eng.last {
		err := w.retry(ctx, func(c *client.Client) error {
			got, err := c.Catalog.AllocateIds(ctx, &api.AllocateIdsRequest{Want: &api.AllocateIdsRequest_Count{Count: idBatch}})
			if err == nil {
				eng.ids = got.GetIds().GetFirst()
				eng.last = eng.ids + idBatch
			}
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	eng.ids++
	return eng.ids - 1, nil
}

// file writes a file of a segment.
func (w *worker) file(ctx context.Context, partition, id, log int64) (*api.File, error) {
	body := make([]byte, 100+w.rand.IntN(2000))
	for i := range body {
		body[i] = byte(w.rand.UintN(256))
	}
	path := fmt.Sprintf("%d/%d/%d/insert/%d/%d", w.engine.collection, partition, id, 100+log%12, log)
	put, err := w.bucket.Put(ctx, prefix+path, body)
	return &api.File{
		Path: path, Kind: "insert", FieldId: 100 + log%12, LogId: log, SizeBytes: put.Size, Etag: put.ETag, Entries: 10,
	}, err
}

// segment writes the files of a segment of the permanent partition: 2, and 12 of
// every fourth segment, so that some records are large enough to be spilled.
func (w *worker) segment(ctx context.Context) (*api.Segment, error) {
	w.engine.created++
	if w.engine.created%4 == 0 {
		return w.segmentIn(ctx, w.engine.partition, 12)
	}
	return w.segmentIn(ctx, w.engine.partition, 2)
}

// segmentIn writes the files of a segment.
func (w *worker) segmentIn(ctx context.Context, partition int64, files int) (*api.Segment, error) {
	id, err := w.newID(ctx)
	if err != nil {
		return nil, err
	}
	s := &api.Segment{Id: id, PartitionId: partition, Rows: 10, StorageVersion: 2}
	for n := range files {
		f, err := w.file(ctx, partition, id, int64(n+1))
		if err != nil {
			return nil, err
		}
		s.Files = append(s.Files, f)
	}
	return s, nil
}

// register adds segments and retries if a replica dies: the files of an
// unregistered segment would stay.
func (w *worker) register(ctx context.Context, list ...*api.Segment) error {
	return w.retry(ctx, func(c *client.Client) error {
		stream, err := c.Catalog.AddSegments(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(
			&api.AddSegmentsRequest{Collection: w.engine.ref(), Segments: list},
		); err != nil &&
			!errors.Is(err, io.EOF) {
			return err
		}
		_, err = stream.CloseAndRecv()
		return err
	})
}

// add adds a segment.
func (w *worker) add(ctx context.Context) (*api.Segment, error) {
	s, err := w.segment(ctx)
	if err == nil {
		err = w.register(ctx, s)
	}
	if err == nil {
		w.engine.live = append(w.engine.live, s.GetId())
	}
	return s, err
}

// write adds two segments.
func (w *worker) write(ctx context.Context) error {
	w.engine.mu.Lock()
	defer w.engine.mu.Unlock()
	for range 2 {
		if _, err := w.add(ctx); err != nil {
			return err
		}
	}
	_, err := w.Catalog.SetCheckpoints(ctx, &api.SetCheckpointsRequest{
		Collection:  w.engine.ref(),
		Checkpoints: []*api.ChannelPosition{{Position: &api.Position{Timestamp: uint64(w.engine.ids)}}},
	})
	return err
}

// compact replaces the two oldest segments by one.
func (w *worker) compact(ctx context.Context) error {
	eng := &w.engine
	eng.mu.Lock()
	defer eng.mu.Unlock()
	if len(eng.live) < 2 {
		return nil
	}
	out, err := w.segment(ctx)
	if err != nil {
		return err
	}
	req := &api.CompactSegmentsRequest{
		Collection:   eng.ref(),
		Inputs:       slices.Clone(eng.live[:2]),
		Outputs:      []*api.Segment{out},
		RequestToken: client.NewRequestToken(),
	}
	err = w.retry(ctx, func(c *client.Client) error {
		_, err := c.Catalog.CompactSegments(ctx, req)
		return err
	})
	if err == nil {
		eng.live = append(eng.live[2:], out.GetId())
	}
	return err
}

// dropOldest drops the oldest segment and returns its id, or 0 without segments.
func (w *worker) dropOldest(ctx context.Context) (int64, error) {
	eng := &w.engine
	eng.mu.Lock()
	defer eng.mu.Unlock()
	if len(eng.live) == 0 {
		return 0, nil
	}
	id := eng.live[0]
	eng.live = eng.live[1:]
	return id, w.retry(ctx, func(c *client.Client) error {
		_, err := c.Catalog.DropSegments(ctx, &api.DropSegmentsRequest{Collection: eng.ref(), SegmentIds: []int64{id}})
		return err
	})
}

func (w *worker) drop(ctx context.Context) error {
	_, err := w.dropOldest(ctx)
	return err
}

// replace adds a segment and replaces its first file.
func (w *worker) replace(ctx context.Context) error {
	w.engine.mu.Lock()
	defer w.engine.mu.Unlock()
	s, err := w.add(ctx)
	if err != nil {
		return err
	}
	f, err := w.file(ctx, s.GetPartitionId(), s.GetId(), 13)
	if err != nil {
		return err
	}
	req := &api.UpdateSegmentsRequest{
		Collection:   w.engine.ref(),
		RequestToken: client.NewRequestToken(),
		Updates: []*api.SegmentUpdate{{
			SegmentId: s.GetId(), RemoveFiles: []*api.FilePath{{Path: s.GetFiles()[0].GetPath()}}, AddFiles: []*api.File{f},
		}},
	}
	return w.retry(ctx, func(c *client.Client) error {
		_, err := c.Catalog.UpdateSegments(ctx, req)
		return err
	})
}

// reclaim drops a segment, requests its files as the deleter, and deletes them.
func (w *worker) reclaim(ctx context.Context) error {
	id, err := w.dropOldest(ctx)
	if err != nil || id == 0 {
		return err
	}
	if _, err := w.Reclaim.Reclaim(ctx, &api.ReclaimRequest{
		Collection: w.engine.ref(), Deleter: api.Deleter_DELETER_CALLER,
		Units: []*api.Unit{{Unit: &api.Unit_SegmentId{SegmentId: id}}},
	}); err != nil {
		return err
	}
	return w.confirm(ctx, w.Client)
}

// confirm deletes the files of the engine's grants and confirms them.
func (e *env) confirm(ctx context.Context, c *client.Client) error {
	list, err := c.Reclaim.ListTombstones(
		ctx,
		&api.ListTombstonesRequest{Collection: e.engine.ref(), Deleter: api.Deleter_DELETER_CALLER},
	)
	if err != nil || len(list.GetTombstones()) == 0 {
		return err
	}
	done := &api.ConfirmReclaimedRequest{Collection: e.engine.ref()}
	for _, t := range list.GetTombstones() {
		for _, f := range t.GetFiles() {
			if err := e.bucket.Delete(ctx, f.GetKey()); err != nil {
				return err
			}
		}
		done.TombstoneIds = append(done.TombstoneIds, t.GetId())
	}
	_, err = c.Reclaim.ConfirmReclaimed(ctx, done)
	return err
}

// partition creates a partition with a segment and drops it.
func (w *worker) partition(ctx context.Context) error {
	ref := w.engine.ref()
	p, err := w.Catalog.CreatePartition(ctx, &api.CreatePartitionRequest{Collection: ref, Name: w.name})
	if err != nil {
		return err
	}
	w.engine.mu.Lock()
	s, err := w.segmentIn(ctx, p.GetPartition().GetId(), 2)
	if err == nil {
		err = w.register(ctx, s)
	}
	w.engine.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = w.Catalog.DropPartition(ctx, &api.DropPartitionRequest{Collection: ref, Name: w.name})
	return err
}

// collection creates a collection and drops it.
func (w *worker) collection(ctx context.Context) error {
	if _, err := w.Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
		Name: &api.CollectionName{
			Name: w.name,
		},
		Roots:    []*api.Root{{Prefix: w.name + "/"}},
		Channels: []string{w.name + "-0", w.name + "-1"},
	}); err != nil {
		return err
	}
	if _, err := w.Catalog.CreateIndex(
		ctx,
		&api.CreateIndexRequest{Collection: collectionRef(w.name), Name: "i", FieldId: 100},
	); err != nil {
		return err
	}
	_, err := w.Catalog.DropCollection(ctx, &api.DropCollectionRequest{Collection: collectionRef(w.name)})
	return err
}

// settle reduces segments and snapshots to their number at the end of every round,
// and waits until no work is left.
func (e *env) settle(ctx context.Context, round int) error {
	ctx, cancel := context.WithTimeout(ctx, idleTimeout)
	defer cancel()
	eng := &e.engine
	err := e.retry(ctx, func(c *client.Client) error {
		list, err := eng.segments(ctx, c)
		if err != nil {
			return err
		}
		eng.live = nil
		for _, s := range list {
			if s.GetPartitionId() == eng.partition {
				eng.live = append(eng.live, s.GetId())
			}
		}
		slices.Sort(eng.live)
		if len(eng.live) <= liveSegments {
			return nil
		}
		_, err = c.Catalog.DropSegments(
			ctx,
			&api.DropSegmentsRequest{Collection: eng.ref(), SegmentIds: eng.live[:len(eng.live)-liveSegments]},
		)
		if err == nil {
			eng.live = eng.live[len(eng.live)-liveSegments:]
		}
		return err
	})
	if err != nil {
		return err
	}
	// Replaced files are deleted before the snapshot: it would hold some of them.
	eng.retained = eng.retained[max(len(eng.retained)-maxRetained+1, 0):]
	if err := e.waitIdle(ctx, 0); err != nil {
		return err
	}
	name := fmt.Sprintf("retained-%d", round)
	req := &api.CreateSnapshotRequest{Collection: eng.ref(), Name: name, RequestToken: client.NewRequestToken()}
	if err := e.retry(ctx, func(c *client.Client) error {
		_, err := c.Snapshots.CreateSnapshot(ctx, req)
		return err
	}); err != nil {
		return err
	}
	eng.retained = append(eng.retained, name)
	return e.waitIdle(ctx, stableFor)
}

// waitIdle waits until no work is left and the counts are stable for a time.
func (e *env) waitIdle(ctx context.Context, stable time.Duration) error {
	var last stored
	var objects int
	since := time.Now()
	for {
		var busy string
		err := e.retry(ctx, func(c *client.Client) (err error) {
			busy, err = e.pendingWork(ctx, c)
			return err
		})
		if err != nil {
			return fmt.Errorf("check for pending work: %w", err)
		}
		now, err := e.count(ctx)
		if err != nil {
			return err
		}
		found, _, err := e.countObjects()
		if err != nil {
			return err
		}
		now.jobs, now.orphaned = 0, 0 // they expire
		if busy != "" || !reflect.DeepEqual(now, last) || found != objects {
			last, objects, since = now, found, time.Now()
		}
		if busy == "" && time.Since(since) >= stable {
			return nil
		}
		if bench.Wait(ctx, pollEvery) != nil {
			return fmt.Errorf("work is left after %v: %s", idleTimeout, busy)
		}
	}
}

// pendingWork drops the remains of the load and returns a description of the
// pending work, or an empty string.
func (e *env) pendingWork(ctx context.Context, c *client.Client) (string, error) {
	jobs, err := c.Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{
		States: []api.RestoreJob_State{api.RestoreJob_STATE_PENDING, api.RestoreJob_STATE_EXECUTING},
	})
	if err != nil || len(jobs.GetJobs()) > 0 {
		return fmt.Sprintf("%d restores", len(jobs.GetJobs())), err
	}
	if left, err := e.dropTemporary(ctx, c); err != nil || left != "" {
		return left, err
	}
	if err := e.confirm(ctx, c); err != nil {
		return "", err
	}
	pins, err := c.Snapshots.ListPins(ctx, &api.ListPinsRequest{})
	if err != nil || len(pins.GetPins()) > 0 {
		return fmt.Sprintf("pins %v", pins.GetPins()), err
	}
	workers, err := e.workers(ctx)
	if err != nil || workers != replicas {
		return fmt.Sprintf("%d workers", workers), err
	}
	s, err := runCycle(ctx, c, false)
	switch {
	case err != nil:
		return "", err
	case s.GetError() != "":
		return "the collector failed: " + s.GetError(), nil
	case s.GetGranted()+s.GetRemoved()+s.GetSwept()+s.GetWaiting() > 0:
		return fmt.Sprintf("the last cycle changed something: %v", s), nil
	}
	status, err := c.Collector.GetCollectorStatus(ctx, &api.GetCollectorStatusRequest{})
	if err != nil || status.GetDeleting()+status.GetUnconfirmed() > 0 || status.GetBlocked() != "" {
		return fmt.Sprintf("the collector has pending work: %v", status), err
	}
	return "", nil
}

// dropTemporary drops everything except what outlives a round, and returns a
// description of the dropped objects that still exist.
func (e *env) dropTemporary(ctx context.Context, c *client.Client) (string, error) {
	var left []string
	collections, err := c.Catalog.ListCollections(ctx, &api.ListCollectionsRequest{States: []api.Collection_State{
		api.Collection_STATE_ACTIVE, api.Collection_STATE_RESTORING, api.Collection_STATE_DROPPING,
	}})
	if err != nil {
		return "", err
	}
	for _, col := range collections.GetCollections() {
		name := col.GetName()
		if name == collectionName {
			continue
		}
		left = append(left, "collection "+name)
		if col.GetState() == api.Collection_STATE_ACTIVE {
			if _, err := c.Catalog.DropCollection(ctx, &api.DropCollectionRequest{Collection: collectionRef(name)}); err != nil {
				return "", err
			}
		}
	}
	partitions, err := c.Catalog.ListPartitions(ctx, &api.ListPartitionsRequest{Collection: e.engine.ref()})
	if err != nil {
		return "", err
	}
	for _, p := range partitions.GetPartitions() {
		if p.GetId() == e.engine.partition {
			continue
		}
		left = append(left, "partition "+p.GetName())
		if p.GetState() == api.Partition_STATE_ACTIVE {
			if _, err := c.Catalog.DropPartition(
				ctx,
				&api.DropPartitionRequest{Collection: e.engine.ref(), Name: p.GetName()},
			); err != nil {
				return "", err
			}
		}
	}
	snapshots, err := c.Snapshots.ListSnapshots(
		ctx,
		&api.ListSnapshotsRequest{PageSize: 1000, States: []api.Snapshot_State{
			api.Snapshot_STATE_PENDING, api.Snapshot_STATE_COMMITTED, api.Snapshot_STATE_DELETING,
		}},
	)
	if err != nil {
		return "", err
	}
	for _, s := range snapshots.GetSnapshots() {
		if slices.Contains(e.engine.retained, s.GetName()) {
			continue
		}
		left = append(left, fmt.Sprintf("snapshot %s, %v", s.GetName(), s.GetState()))
		if s.GetState() == api.Snapshot_STATE_COMMITTED && s.GetExpireTime() == nil {
			if _, err := c.Snapshots.DropSnapshot(
				ctx,
				&api.DropSnapshotRequest{Snapshot: named(s.GetName())},
			); err != nil &&
				client.Reason(err) != "SNAPSHOT_PINNED" {
				return "", err
			}
		}
	}
	return strings.Join(left, ", "), nil
}
