//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"

	"golang.org/x/sync/errgroup"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	firstField = 100
	channels   = 2

	// firstTimestamp is in the form of a hybrid clock: milliseconds, and 18 bits
	// of a counter.
	firstTimestamp = uint64(1_790_000_000_000) << 18
	lastTimestamp  = firstTimestamp + uint64(3_000_000_000)<<18

	swapSegments = 30 // that a compaction drops, and as many that it adds
	writers      = 4  // concurrent calls
	forgetEvery  = 50 // snapshots between compactions of etcd
)

// collection is a collection of the benchmark.
type collection struct {
	id, partition, index int64
	live                 []int64 // segments
	dropped              []int64 // segments that snapshots hold, in the order of dropping

	referenced  int64 // segments that snapshots hold
	first, last int64 // of their ids
}

// noted counts segments that no earlier snapshot holds.
func (c *collection) noted(ids []int64) {
	c.referenced += int64(len(ids))
	if c.first == 0 {
		c.first = slices.Min(ids)
	}
	c.last = max(c.last, slices.Max(ids))
}

func (c *collection) ref() *snapshotdv1.CollectionRef {
	return &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: c.id}}
}

// newCollection creates an empty collection.
func newCollection(ctx context.Context, c *client.Client) (*collection, error) {
	const name = "refs"
	made, err := c.Catalog.CreateCollection(ctx, &snapshotdv1.CreateCollectionRequest{
		Name: &snapshotdv1.CollectionName{Name: name}, Channels: []string{name + "-0", name + "-1"},
		Roots:        []*snapshotdv1.Root{{Prefix: "data/" + name + "/"}},
		RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	col := &collection{id: made.GetCollection().GetId()}
	p, err := c.Catalog.CreatePartition(ctx, &snapshotdv1.CreatePartitionRequest{
		Collection: col.ref(), Name: "p", RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	x, err := c.Catalog.CreateIndex(ctx, &snapshotdv1.CreateIndexRequest{
		Collection: col.ref(), Name: "x", FieldId: firstField, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	col.partition, col.index = p.GetPartition().GetId(), x.GetIndex().GetId()
	var cps []*snapshotdv1.ChannelPosition
	for shard := range int32(channels) {
		cps = append(
			cps,
			&snapshotdv1.ChannelPosition{Shard: shard, Position: &snapshotdv1.Position{Timestamp: lastTimestamp}},
		)
	}
	_, err = c.Catalog.SetCheckpoints(ctx, &snapshotdv1.SetCheckpointsRequest{Collection: col.ref(), Checkpoints: cps})
	return col, err
}

// shape has the numbers of files of a segment.
type shape struct{ logs, others, index int }

var (
	// full is a segment with the logs of 8 fields, one of deletes, one of
	// statistics, and an index build of 2: one as bench-create has.
	full = shape{8, 2, 2}
	// slim has a log and an index build of 1 file. To references it is the same.
	slim = shape{1, 0, 1}
)

// newSegments makes n segments of a collection under ids of their own, each with
// an index build.
func newSegments(
	ctx context.Context,
	c *client.Client,
	col *collection,
	n int,
	s shape,
) ([]*snapshotdv1.Segment, error) {
	ids, err := c.Catalog.AllocateIds(ctx, &snapshotdv1.AllocateIdsRequest{
		Want: &snapshotdv1.AllocateIdsRequest_Count{Count: int64(2 * n)}, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	first := ids.GetIds().GetFirst()
	list := make([]*snapshotdv1.Segment, n)
	for i := range list {
		list[i] = newSegment(col, first+int64(i), first+int64(n+i), s)
	}
	return list, nil
}

func newSegment(col *collection, id, build int64, s shape) *snapshotdv1.Segment {
	r := rand.New(rand.NewPCG(uint64(id), uint64(build))) //nolint:gosec // ids are positive
	start := firstTimestamp + uint64(id)<<20              //nolint:gosec // as above
	end := start + 1<<24
	rows := 50_000 + r.Int64N(100_000)
	logs := int64(0)
	file := func(kind, place string, field int64) *snapshotdv1.File {
		logs++
		f := &snapshotdv1.File{
			Path: fmt.Sprintf("%d/%d/%d/%s/%s%d", col.id, col.partition, id, kind, place, id*64+logs),
			Kind: kind, FieldId: field, LogId: id*64 + logs, SizeBytes: 1<<16 + r.Int64N(1<<26),
			Etag: fmt.Sprintf("%016x%016x", r.Uint64(), r.Uint64()),
		}
		if kind == "insert" || kind == "delta" {
			f.MinTimestamp, f.MaxTimestamp, f.Entries = start+r.Uint64N(1<<20), end-r.Uint64N(1<<20), rows
		}
		return f
	}
	out := &snapshotdv1.Segment{
		Id: id, PartitionId: col.partition, Shard: int32(id % channels), Rows: rows, StorageVersion: 2, Sorted: true,
		StartPosition: &snapshotdv1.Position{Timestamp: start}, DmlPosition: &snapshotdv1.Position{Timestamp: end + 1},
	}
	for k := range int64(s.logs) {
		out.Files = append(out.Files, file("insert", fmt.Sprintf("%d/", firstField+k), firstField+k))
	}
	if s.others > 0 {
		out.Files = append(out.Files, file("delta", "0/", 0), file("stats", "100/", firstField))
	}
	b := &snapshotdv1.IndexBuild{Id: build, IndexId: col.index, FieldId: firstField}
	for range s.index { // the paths carry the build's id, so that none is a foreign file
		b.Files = append(b.Files, file("index", fmt.Sprintf("%d/%d-", build, firstField), firstField))
	}
	out.IndexBuilds = []*snapshotdv1.IndexBuild{b}
	return out
}

// register adds n new segments to the collection.
func register(ctx context.Context, c *client.Client, col *collection, n int, s shape) ([]int64, error) {
	list, err := newSegments(ctx, c, col, n, s)
	if err != nil {
		return nil, err
	}
	ids := make([]int64, n)
	for i := range list {
		ids[i] = list[i].GetId()
	}
	return ids, bench.AddSegments(ctx, c, col.ref(), list)
}

// compact replaces n segments, which r picks, by as many new ones.
func compact(ctx context.Context, c *client.Client, col *collection, r *rand.Rand, n int) error {
	list, err := newSegments(ctx, c, col, n, slim)
	if err != nil {
		return err
	}
	r.Shuffle(len(col.live), func(i, j int) { col.live[i], col.live[j] = col.live[j], col.live[i] })
	out := slices.Clone(col.live[:n])
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(writers)
	for at := 0; at < n; at += swapSegments {
		end := min(at+swapSegments, n)
		group.Go(func() error {
			_, err := c.Catalog.CompactSegments(groupCtx, &snapshotdv1.CompactSegmentsRequest{
				Collection: col.ref(), Inputs: out[at:end], Outputs: list[at:end], RequestToken: client.NewRequestToken(),
			})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for i := range n {
		col.live[i] = list[i].GetId()
	}
	col.noted(col.live[:n])
	col.dropped = append(col.dropped, out...)
	return nil
}

// create takes a snapshot and returns its id.
func create(ctx context.Context, c *client.Client, col *collection, name string) (int64, error) {
	resp, err := c.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
		Collection: col.ref(), Name: name, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return 0, err
	}
	if got := resp.GetSnapshot().GetTotals().GetSegments(); got != int64(len(col.live)) {
		return 0, fmt.Errorf("a snapshot of %d segments", got)
	}
	return resp.GetSnapshot().GetId(), nil
}

// fill creates the collection and its snapshots. Each differs from the one before it
// in a share of its segments.
func (e *env) fill(ctx context.Context, cl *cluster) (*collection, error) {
	col, err := newCollection(ctx, cl.client)
	if err != nil {
		return nil, err
	}
	if col.live, err = register(ctx, cl.client, col, e.segments, full); err != nil {
		return nil, err
	}
	col.noted(col.live)
	random := rand.New(rand.NewPCG(e.seed, 0))
	for i := range e.snapshots {
		if i > 0 {
			if err := compact(ctx, cl.client, col, random, e.replaced()); err != nil {
				return nil, err
			}
		}
		if _, err := create(ctx, cl.client, col, fmt.Sprintf("s%d", i)); err != nil {
			return nil, err
		}
		if (i+1)%forgetEvery == 0 {
			if err := bench.CompactEtcd(ctx, cl.at); err != nil {
				return nil, err
			}
			e.Logf("%d snapshots, load %.2f", i+1, bench.Load())
		}
	}
	return col, nil
}
