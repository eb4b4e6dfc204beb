//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"math/rand/v2"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// A segment of the benchmark has 12 files: a log for each of 8 fields, one of
// deletes, one of statistics, and an index build of 2.
const (
	fields     = 8
	firstField = 100
	files      = fields + 4
	channels   = 2

	// firstTimestamp is in the form of a hybrid clock: milliseconds, and 18 bits
	// of a counter.
	firstTimestamp = uint64(1_790_000_000_000) << 18
	lastTimestamp  = firstTimestamp + uint64(3_000_000_000)<<18
)

// collection is one that was made for the benchmark.
type collection struct {
	id, partition, index int64
}

func ref(id int64) *snapshotdv1.CollectionRef {
	return &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: id}}
}

// newCollection makes an empty collection.
func newCollection(ctx context.Context, c *client.Client, name string) (collection, error) {
	made, err := c.Catalog.CreateCollection(ctx, &snapshotdv1.CreateCollectionRequest{
		Name: &snapshotdv1.CollectionName{Name: name}, Channels: []string{name + "-0", name + "-1"},
		Roots:        []*snapshotdv1.Root{{Prefix: "data/" + name + "/"}},
		RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return collection{}, err
	}
	id := made.GetCollection().GetId()
	p, err := c.Catalog.CreatePartition(ctx, &snapshotdv1.CreatePartitionRequest{
		Collection: ref(id), Name: "p", RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return collection{}, err
	}
	x, err := c.Catalog.CreateIndex(ctx, &snapshotdv1.CreateIndexRequest{
		Collection: ref(id), Name: "x", FieldId: firstField, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return collection{}, err
	}
	var cps []*snapshotdv1.ChannelPosition
	for shard := range int32(channels) {
		cps = append(
			cps,
			&snapshotdv1.ChannelPosition{Shard: shard, Position: &snapshotdv1.Position{Timestamp: lastTimestamp}},
		)
	}
	_, err = c.Catalog.SetCheckpoints(ctx, &snapshotdv1.SetCheckpointsRequest{Collection: ref(id), Checkpoints: cps})
	return collection{id, p.GetPartition().GetId(), x.GetIndex().GetId()}, err
}

// newSegments makes n segments of a collection, registered under ids of their
// own. Equal ids make equal segments.
func newSegments(ctx context.Context, c *client.Client, col collection, n int) ([]*snapshotdv1.Segment, error) {
	ids, err := c.Catalog.AllocateIds(ctx, &snapshotdv1.AllocateIdsRequest{
		Want: &snapshotdv1.AllocateIdsRequest_Count{Count: int64(2 * n)}, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	first := ids.GetIds().GetFirst()
	list := make([]*snapshotdv1.Segment, n)
	for i := range list {
		list[i] = newSegment(col, first+int64(i), first+int64(n+i), i)
	}
	return list, nil
}

func newSegment(col collection, id, build int64, i int) *snapshotdv1.Segment {
	h := fnv.New128a()
	_ = binary.Write(h, binary.BigEndian, id)
	seed := h.Sum(nil)
	r := rand.New(rand.NewPCG(binary.BigEndian.Uint64(seed), binary.BigEndian.Uint64(seed[8:])))
	start := firstTimestamp + uint64(i)<<25
	end := start + 1<<24 + r.Uint64N(1<<24)
	rows := 50_000 + r.Int64N(100_000)
	file := func(kind string, field int64, n int) *snapshotdv1.File {
		log := id*64 + int64(n)
		var etag [16]byte
		binary.BigEndian.PutUint64(etag[:], r.Uint64())
		binary.BigEndian.PutUint64(etag[8:], r.Uint64())
		f := &snapshotdv1.File{
			Path: fmt.Sprintf("%d/%d/%d/%s/%d/%d", col.id, col.partition, id, kind, field, log),
			Kind: kind, FieldId: field, LogId: log, SizeBytes: 1<<16 + r.Int64N(1<<26), Etag: hex.EncodeToString(etag[:]),
		}
		if kind == "insert" || kind == "delta" {
			f.MinTimestamp, f.MaxTimestamp, f.Entries = start+r.Uint64N(1<<20), end-r.Uint64N(1<<20), rows
		}
		return f
	}
	s := &snapshotdv1.Segment{
		Id: id, PartitionId: col.partition, Shard: int32(i % channels), Rows: rows, StorageVersion: 2, Sorted: true,
		StartPosition: &snapshotdv1.Position{Timestamp: start}, DmlPosition: &snapshotdv1.Position{Timestamp: end + 1},
	}
	for k := range fields {
		s.Files = append(s.Files, file("insert", int64(firstField+k), k))
	}
	s.Files = append(s.Files, file("delta", 0, fields), file("stats", firstField, fields+1))
	s.IndexBuilds = []*snapshotdv1.IndexBuild{{
		Id: build, IndexId: col.index, FieldId: firstField,
		Files: []*snapshotdv1.File{file("index", firstField, fields+2), file("index", firstField, fields+3)},
	}}
	return s
}

// messages packs segments into messages, dealt out to streams.
func messages(id int64, list []*snapshotdv1.Segment, streams, perMessage int) [][]*snapshotdv1.AddSegmentsRequest {
	out := make([][]*snapshotdv1.AddSegmentsRequest, streams)
	for i := 0; len(list) > 0; i++ {
		n := min(perMessage, len(list))
		s := i % streams
		out[s] = append(out[s], &snapshotdv1.AddSegmentsRequest{Collection: ref(id), Segments: list[:n]})
		list = list[n:]
	}
	return out
}
