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
	living         = 36              // segments at the end of a round: those that it has made
	patience       = time.Minute     // until nothing is left to do
	pollEvery      = time.Second / 4 // for that
	stableFor      = 2500 * time.Millisecond
	idsEach        = 1000
)

// engine is what writes segments. It does one thing after the other.
type engine struct {
	mu         sync.Mutex
	collection int64
	partition  int64
	ids, last  int64 // that it may use
	made       int   // segments of the partition
	live       []int64
	kept       []string // snapshots that live from round to round
}

func (e *engine) ref() *api.CollectionRef {
	return &api.CollectionRef{Ref: &api.CollectionRef_Id{Id: e.collection}}
}

func collectionRef(name string) *api.CollectionRef {
	return &api.CollectionRef{Ref: &api.CollectionRef_Name{Name: &api.CollectionName{Name: name}}}
}

// segments returns the segments that there are.
func (e *engine) segments(ctx context.Context, c *client.Client) ([]*api.Segment, error) {
	stream, err := c.Catalog.ExportSegments(ctx, &api.ExportSegmentsRequest{Collection: e.ref()})
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

// prepare makes the collection.
func (r *env) prepare(ctx context.Context) error {
	c := r.replicas[0].Load().client
	made, err := c.Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
		Name: &api.CollectionName{Name: collectionName}, Roots: []*api.Root{{Prefix: prefix}},
	})
	if err != nil {
		return err
	}
	r.engine.collection = made.GetCollection().GetId()
	p, err := c.Catalog.CreatePartition(ctx, &api.CreatePartitionRequest{Collection: r.engine.ref(), Name: "p"})
	r.engine.partition = p.GetPartition().GetId()
	return err
}

// insist makes a call until it is answered, at one replica after the other.
func (r *env) insist(ctx context.Context, call func(*client.Client) error) error {
	for n := 0; ; n++ {
		err := call(r.replicas[n%replicas].Load().client)
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

// newID returns an id that nothing has.
func (w *worker) newID(ctx context.Context) (int64, error) {
	e := &w.engine
	if e.ids == e.last {
		err := w.insist(ctx, func(c *client.Client) error {
			got, err := c.Catalog.AllocateIds(ctx, &api.AllocateIdsRequest{Want: &api.AllocateIdsRequest_Count{Count: idsEach}})
			if err == nil {
				e.ids = got.GetIds().GetFirst()
				e.last = e.ids + idsEach
			}
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	e.ids++
	return e.ids - 1, nil
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

// segment writes the files of a segment of the partition that lives: few or, of
// each fourth, many, so that the records of some of them, once dropped, are parked
// and those of others not.
func (w *worker) segment(ctx context.Context) (*api.Segment, error) {
	w.engine.made++
	if w.engine.made%4 == 0 {
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

// register adds segments, whatever becomes of replicas meanwhile: files that
// nothing knows would stay.
func (w *worker) register(ctx context.Context, list ...*api.Segment) error {
	return w.insist(ctx, func(c *client.Client) error {
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

// compact makes one segment of the two oldest.
func (w *worker) compact(ctx context.Context) error {
	e := &w.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.live) < 2 {
		return nil
	}
	out, err := w.segment(ctx)
	if err != nil {
		return err
	}
	req := &api.CompactSegmentsRequest{
		Collection:   e.ref(),
		Inputs:       slices.Clone(e.live[:2]),
		Outputs:      []*api.Segment{out},
		RequestToken: client.NewRequestToken(),
	}
	err = w.insist(ctx, func(c *client.Client) error {
		_, err := c.Catalog.CompactSegments(ctx, req)
		return err
	})
	if err == nil {
		e.live = append(e.live[2:], out.GetId())
	}
	return err
}

// take drops the oldest segment, and returns it.
func (w *worker) take(ctx context.Context) (int64, error) {
	e := &w.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.live) == 0 {
		return 0, nil
	}
	id := e.live[0]
	e.live = e.live[1:]
	return id, w.insist(ctx, func(c *client.Client) error {
		_, err := c.Catalog.DropSegments(ctx, &api.DropSegmentsRequest{Collection: e.ref(), SegmentIds: []int64{id}})
		return err
	})
}

func (w *worker) drop(ctx context.Context) error {
	_, err := w.take(ctx)
	return err
}

// replace adds a segment and puts another file in the place of its first.
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
	return w.insist(ctx, func(c *client.Client) error {
		_, err := c.Catalog.UpdateSegments(ctx, req)
		return err
	})
}

// reclaim drops a segment, and asks for its files to delete them itself.
func (w *worker) reclaim(ctx context.Context) error {
	id, err := w.take(ctx)
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

// confirm deletes what was granted to the engine, and says so.
func (r *env) confirm(ctx context.Context, c *client.Client) error {
	list, err := c.Reclaim.ListTombstones(
		ctx,
		&api.ListTombstonesRequest{Collection: r.engine.ref(), Deleter: api.Deleter_DELETER_CALLER},
	)
	if err != nil || len(list.GetTombstones()) == 0 {
		return err
	}
	done := &api.ConfirmReclaimedRequest{Collection: r.engine.ref()}
	for _, t := range list.GetTombstones() {
		for _, f := range t.GetFiles() {
			if err := r.bucket.Delete(ctx, f.GetKey()); err != nil {
				return err
			}
		}
		done.TombstoneIds = append(done.TombstoneIds, t.GetId())
	}
	_, err = c.Reclaim.ConfirmReclaimed(ctx, done)
	return err
}

// partition makes a partition with a segment and drops it.
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

// collection makes a collection and drops it.
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

// settle leaves as many segments and snapshots as at the end of every round, and
// waits until nothing is left to do.
func (r *env) settle(ctx context.Context, round int) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	e := &r.engine
	err := r.insist(ctx, func(c *client.Client) error {
		list, err := e.segments(ctx, c)
		if err != nil {
			return err
		}
		e.live = nil
		for _, s := range list {
			if s.GetPartitionId() == e.partition {
				e.live = append(e.live, s.GetId())
			}
		}
		slices.Sort(e.live)
		if len(e.live) <= living {
			return nil
		}
		_, err = c.Catalog.DropSegments(
			ctx,
			&api.DropSegmentsRequest{Collection: e.ref(), SegmentIds: e.live[:len(e.live)-living]},
		)
		if err == nil {
			e.live = e.live[len(e.live)-living:]
		}
		return err
	})
	if err != nil {
		return err
	}
	// Replaced files go before the snapshot, which would hold some of them or not.
	e.kept = e.kept[max(len(e.kept)-retained+1, 0):]
	if err := r.awaitIdle(ctx, 0); err != nil {
		return err
	}
	name := fmt.Sprintf("kept-%d", round)
	req := &api.CreateSnapshotRequest{Collection: e.ref(), Name: name, RequestToken: client.NewRequestToken()}
	if err := r.insist(ctx, func(c *client.Client) error {
		_, err := c.Snapshots.CreateSnapshot(ctx, req)
		return err
	}); err != nil {
		return err
	}
	e.kept = append(e.kept, name)
	return r.awaitIdle(ctx, stableFor)
}

// awaitIdle waits until nothing is left to do, and nothing changes for so long.
func (r *env) awaitIdle(ctx context.Context, stable time.Duration) error {
	var was stored
	var objects int
	since := time.Now()
	for {
		var busy string
		err := r.insist(ctx, func(c *client.Client) (err error) {
			busy, err = r.busy(ctx, c)
			return err
		})
		if err != nil {
			return fmt.Errorf("what is left to do: %w", err)
		}
		now, err := r.count(ctx)
		if err != nil {
			return err
		}
		found, _, err := r.countObjects()
		if err != nil {
			return err
		}
		now.jobs, now.strays = 0, 0 // they go by their own time
		if busy != "" || !reflect.DeepEqual(now, was) || found != objects {
			was, objects, since = now, found, time.Now()
		}
		if busy == "" && time.Since(since) >= stable {
			return nil
		}
		if bench.Wait(ctx, pollEvery) != nil {
			return fmt.Errorf("after %v there is still something to do: %s", patience, busy)
		}
	}
}

// busy drops what the load has left, and says what is still to be done.
func (r *env) busy(ctx context.Context, c *client.Client) (string, error) {
	jobs, err := c.Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{
		States: []api.RestoreJob_State{api.RestoreJob_STATE_PENDING, api.RestoreJob_STATE_EXECUTING},
	})
	if err != nil || len(jobs.GetJobs()) > 0 {
		return fmt.Sprintf("%d restores", len(jobs.GetJobs())), err
	}
	if left, err := r.dropRest(ctx, c); err != nil || left != "" {
		return left, err
	}
	if err := r.confirm(ctx, c); err != nil {
		return "", err
	}
	pins, err := c.Snapshots.ListPins(ctx, &api.ListPinsRequest{})
	if err != nil || len(pins.GetPins()) > 0 {
		return fmt.Sprintf("pins %v", pins.GetPins()), err
	}
	workers, err := r.workers(ctx)
	if err != nil || workers != replicas {
		return fmt.Sprintf("%d workers", workers), err
	}
	s, err := roundOf(ctx, c, false)
	switch {
	case err != nil:
		return "", err
	case s.GetError() != "":
		return "the collector failed: " + s.GetError(), nil
	case s.GetGranted()+s.GetRemoved()+s.GetSwept()+s.GetWaiting() > 0:
		return fmt.Sprintf("the collector did something: %v", s), nil
	}
	status, err := c.Collector.GetCollectorStatus(ctx, &api.GetCollectorStatusRequest{})
	if err != nil || status.GetDeleting()+status.GetUnconfirmed() > 0 || status.GetBlocked() != "" {
		return fmt.Sprintf("the collector has something to do: %v", status), err
	}
	return "", nil
}

// dropRest drops all but what is kept from round to round, and says what is on its
// way to be gone.
func (r *env) dropRest(ctx context.Context, c *client.Client) (string, error) {
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
	partitions, err := c.Catalog.ListPartitions(ctx, &api.ListPartitionsRequest{Collection: r.engine.ref()})
	if err != nil {
		return "", err
	}
	for _, p := range partitions.GetPartitions() {
		if p.GetId() == r.engine.partition {
			continue
		}
		left = append(left, "partition "+p.GetName())
		if p.GetState() == api.Partition_STATE_ACTIVE {
			if _, err := c.Catalog.DropPartition(
				ctx,
				&api.DropPartitionRequest{Collection: r.engine.ref(), Name: p.GetName()},
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
		if slices.Contains(r.engine.kept, s.GetName()) {
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
