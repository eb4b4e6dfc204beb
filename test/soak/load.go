//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	pace        = 60 * time.Millisecond // between the starts of two operations
	concurrency = 6                     // operations at a time
	callTimeout = 20 * time.Second      // of one operation
	maxRetained = 2                     // snapshots that outlive a round
)

// worker runs one operation. Its seed decides its random choices.
type worker struct {
	*env
	*client.Client // of a random replica
	rand           *rand.Rand
	name           string // unique
}

// operations are the operations of a round, with their number.
var operations = []struct {
	times int
	name  string
	do    func(*worker, context.Context) error
}{
	{13, "write", (*worker).write},
	{6, "compact", (*worker).compact},
	{4, "drop segment", (*worker).drop},
	{4, "replace file", (*worker).replace},
	{2, "reclaim", (*worker).reclaim},
	{2, "partition", (*worker).partition},
	{1, "collection", (*worker).collection},
	{6, "snapshot", (*worker).snapshot},
	{3, "snapshot that expires", (*worker).expiring},
	{3, "pin", (*worker).pin},
	{3, "restore", (*worker).restore},
	{2, "cancel", (*worker).cancel},
	{8, "watch", (*worker).watch},
	{10, "read", (*worker).read},
	{3, "collect", (*worker).collect},
	{12, "invalid request", (*worker).invalidRequest},
	{10, "abandoned call", (*worker).abandon},
	{4, "connection", (*worker).connect},
}

// load runs the operations of a round. With fail the leader fails in the middle.
func (e *env) load(ctx context.Context, round int, fail bool) error {
	var list []int // indexes of operations
	for i, t := range operations {
		for range t.times {
			list = append(list, i)
		}
	}
	chance := rand.New(rand.NewPCG(e.seed, uint64(round))) //nolint:gosec // of a load
	chance.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })

	watching, stop := context.WithCancel(ctx)
	defer stop()
	var group, streams sync.WaitGroup
	for i := range e.replicas { // as long as the round
		events := e.replicas[i].Load().client.Events
		streams.Go(func() {
			_ = client.WatchEvents(
				watching,
				events,
				&api.WatchEventsRequest{},
				func(*api.WatchEventsResponse) error { return nil },
			)
		})
	}
	var failed error
	slots := make(chan struct{}, concurrency)
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for n, i := range list {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
		if fail && n == len(list)/2 {
			group.Go(func() { failed = e.failOver(ctx) })
		}
		w := &worker{
			env: e, Client: e.replicas[chance.IntN(replicas)].Load().client, name: fmt.Sprintf("n%d_%d", round, n),
			rand: rand.New(rand.NewPCG(chance.Uint64(), 0)), //nolint:gosec // of a load
		}
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			each, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			e.countCall(operations[i].name, operations[i].do(w, each))
		})
	}
	group.Wait()
	stop()
	streams.Wait()
	return errors.Join(ctx.Err(), failed)
}

// countCall counts the outcome of an operation.
func (e *env) countCall(operation string, err error) {
	outcome := "done"
	code := status.Code(err)
	if errors.Is(err, context.DeadlineExceeded) {
		code = codes.DeadlineExceeded
	}
	if err != nil {
		outcome = strings.TrimSpace(code.String() + " " + client.Reason(err))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.calls[operation+": "+outcome]++
	switch code {
	case codes.Internal, codes.Unknown, codes.DataLoss, codes.Unimplemented, codes.InvalidArgument:
		e.unexpected = append(e.unexpected, operation+": "+err.Error())
	default:
	}
}

// retained returns a random snapshot that outlives a round.
func (e *env) retained(chance *rand.Rand) *api.SnapshotRef {
	e.engine.mu.Lock()
	defer e.engine.mu.Unlock()
	if len(e.engine.retained) == 0 {
		return named("none-yet")
	}
	return named(e.engine.retained[chance.IntN(len(e.engine.retained))])
}

func named(name string) *api.SnapshotRef {
	return &api.SnapshotRef{Ref: &api.SnapshotRef_Name{Name: name}}
}

func (w *worker) snapshot(ctx context.Context) error {
	token := ""
	if w.rand.IntN(3) == 0 { // tokens stay for a day
		token = client.NewRequestToken()
	}
	if _, err := w.Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{
		Collection: w.engine.ref(), Name: w.name, Labels: map[string]string{"by": "soak"}, RequestToken: token,
	}); err != nil {
		return err
	}
	if _, err := w.Snapshots.DescribeSnapshot(
		ctx,
		&api.DescribeSnapshotRequest{Snapshot: named(w.name), IncludeUsage: true},
	); err != nil {
		return err
	}
	if err := bench.Wait(ctx, time.Duration(w.rand.IntN(2000))*time.Millisecond); err != nil {
		return err
	}
	_, err := w.Snapshots.DropSnapshot(ctx, &api.DropSnapshotRequest{Snapshot: named(w.name), RequestToken: token})
	return err
}

func (w *worker) expiring(ctx context.Context) error {
	_, err := w.Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{
		Collection: w.engine.ref(),
		Name:       w.name,
		Expiry:     &api.CreateSnapshotRequest_Ttl{Ttl: durationpb.New(2 * time.Second)},
	})
	return err
}

func (w *worker) pin(ctx context.Context) error {
	ref := w.retained(w.rand)
	for _, ttl := range []time.Duration{time.Second, time.Hour} { // the first expires
		got, err := w.Snapshots.PinSnapshot(
			ctx,
			&api.PinSnapshotRequest{Snapshot: ref, Owner: "soak", Ttl: durationpb.New(ttl)},
		)
		if err != nil {
			return err
		}
		if ttl == time.Second {
			continue
		}
		id := got.GetPin().GetId()
		_, err = w.Snapshots.RenewPin(ctx, &api.RenewPinRequest{Snapshot: ref, PinId: id, Ttl: durationpb.New(ttl)})
		_, unpinErr := w.Snapshots.UnpinSnapshot(ctx, &api.UnpinSnapshotRequest{Snapshot: ref, PinId: id})
		if err = errors.Join(err, unpinErr); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) admit(ctx context.Context, limits *api.RestoreLimits) (int64, error) {
	got, err := w.Snapshots.RestoreSnapshot(ctx, &api.RestoreSnapshotRequest{
		Snapshot: w.retained(w.rand), Target: &api.CollectionName{Name: w.name}, Limits: limits,
	})
	return got.GetJobId(), err
}

// restore restores a snapshot and drops the new collection.
func (w *worker) restore(ctx context.Context) error {
	id, err := w.admit(ctx, nil)
	if err != nil {
		return err
	}
	job, err := client.WaitRestore(ctx, w.Snapshots, id)
	if err == nil && job.GetState() != api.RestoreJob_STATE_COMPLETED {
		err = fmt.Errorf("a restore ended as %v: %s %s", job.GetState(), job.GetReason(), job.GetMessage())
	}
	if err != nil {
		return err
	}
	_, err = w.Catalog.DropCollection(ctx, &api.DropCollectionRequest{Collection: collectionRef(w.name)})
	return err
}

// cancel starts a slow restore and cancels it while it runs.
func (w *worker) cancel(ctx context.Context) error {
	id, err := w.admit(ctx, &api.RestoreLimits{RequestsPerSecond: 1})
	if err != nil {
		return err
	}
	errEnough := errors.New("started")
	err = client.WatchRestore(ctx, w.Snapshots, id, func(job *api.RestoreJob) error {
		if job.GetState() != api.RestoreJob_STATE_PENDING {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return err
	}
	if _, err := w.Snapshots.CancelRestore(ctx, &api.CancelRestoreRequest{JobId: id}); err != nil {
		return err
	}
	_, err = client.WaitRestore(ctx, w.Snapshots, id)
	return err
}

// watch opens a stream of events and closes it.
func (w *worker) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req := &api.WatchEventsRequest{}
	if w.rand.IntN(2) == 0 {
		req.Collection = w.engine.ref()
	}
	stream, err := w.Events.WatchEvents(ctx, req)
	if err != nil {
		return err
	}
	if w.rand.IntN(3) == 0 {
		return nil // without a read
	}
	_, err = stream.Recv()
	return err
}

func (w *worker) read(ctx context.Context) error {
	ref := w.retained(w.rand)
	var err error
	switch w.rand.IntN(7) {
	case 0:
		_, err = w.Snapshots.ListSnapshots(ctx, &api.ListSnapshotsRequest{PageSize: 2})
	case 1:
		_, err = w.Snapshots.GetSnapshot(ctx, &api.GetSnapshotRequest{Snapshot: ref})
	case 2:
		_, err = w.Snapshots.ListSnapshotSegments(ctx, &api.ListSnapshotSegmentsRequest{
			Snapshot: ref, View: api.SegmentView_SEGMENT_VIEW_FILES, PageSize: 3,
		})
	case 3:
		_, err = w.Snapshots.DropSnapshot(ctx, &api.DropSnapshotRequest{Snapshot: ref, DryRun: true})
	case 4:
		_, err = w.Snapshots.RestoreSnapshot(ctx, &api.RestoreSnapshotRequest{
			Snapshot: ref, Target: &api.CollectionName{Name: w.name}, DryRun: true, Verify: true,
		})
	case 5:
		_, err = w.engine.segments(ctx, w.Client)
	default:
		var stream interface {
			Recv() (*api.ListOrphansResponse, error)
		}
		if stream, err = w.Collector.ListOrphans(ctx, &api.ListOrphansRequest{Collection: w.engine.ref()}); err == nil {
			_, err = stream.Recv() // only one message
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
	}
	return err
}

func (w *worker) collect(ctx context.Context) error {
	_, err := runCycle(ctx, w.Client, w.rand.IntN(2) == 0)
	return err
}

// runCycle requests a cycle of the collector and returns its summary.
func runCycle(ctx context.Context, c *client.Client, dry bool) (*api.CollectSummary, error) {
	stream, err := c.Collector.Collect(ctx, &api.CollectRequest{
		Tolerance: durationpb.New(0), Wait: !dry, DryRun: dry, Sweep: true,
	})
	var summary *api.CollectSummary
	for err == nil {
		var m *api.CollectResponse
		if m, err = stream.Recv(); m.GetSummary() != nil {
			summary = m.GetSummary()
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return summary, err
}

// invalidRequest sends a request that the server must reject.
func (w *worker) invalidRequest(ctx context.Context) error {
	var err error
	var want codes.Code
	switch w.rand.IntN(6) {
	case 0:
		want = codes.InvalidArgument
		_, err = w.Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{Collection: w.engine.ref(), Name: "no/name"})
	case 1:
		want = codes.NotFound
		_, err = w.Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{Collection: collectionRef("none"), Name: w.name})
	case 2:
		want = codes.NotFound
		_, err = w.Snapshots.RestoreSnapshot(
			ctx,
			&api.RestoreSnapshotRequest{Snapshot: named("none"), Target: &api.CollectionName{Name: w.name}},
		)
	case 3:
		want = codes.InvalidArgument
		_, err = w.Snapshots.ListSnapshots(ctx, &api.ListSnapshotsRequest{PageToken: "none"})
	case 4:
		want = codes.AlreadyExists
		_, err = w.Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
			Name: &api.CollectionName{Name: collectionName}, Roots: []*api.Root{{Prefix: prefix}},
		})
	default:
		want = codes.NotFound
		stream, streamErr := w.Snapshots.WatchRestore(ctx, &api.WatchRestoreRequest{JobId: 1 << 60})
		if err = streamErr; err == nil {
			_, err = stream.Recv()
		}
	}
	switch status.Code(err) {
	case want:
		return nil
	case codes.OK:
		return errors.New("an invalid request succeeded")
	case codes.InvalidArgument:
		return fmt.Errorf("%w, not %v", err, want)
	default:
		return err
	}
}

// abandon cancels a call, mostly before its end.
func (w *worker) abandon(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(w.rand.IntN(12_000))*time.Microsecond)
	defer cancel()
	switch w.rand.IntN(4) {
	case 0:
		_, err := w.Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{Collection: w.engine.ref(), Name: w.name})
		return err
	case 1:
		_, err := w.admit(ctx, nil)
		return err
	case 2:
		_, err := runCycle(ctx, w.Client, true)
		return err
	default:
		_, err := w.engine.segments(ctx, w.Client)
		return err
	}
}

// connect opens and closes a connection, of a client or with random bytes.
func (w *worker) connect(ctx context.Context) error {
	addr := w.replicas[w.rand.IntN(replicas)].Load().server.Listen
	if w.rand.IntN(2) == 0 {
		c, err := client.Dial(addr, client.Options{})
		if err != nil {
			return err
		}
		_, err = c.Admin.GetServerInfo(ctx, &api.GetServerInfoRequest{})
		return errors.Join(err, c.Close())
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	_, err = conn.Write(slices.Repeat([]byte{byte(w.rand.IntN(256))}, w.rand.IntN(100)))
	if err = errors.Join(err, conn.Close()); err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	return nil
}
