package catalog

import (
	"context"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// View is a collection at one revision, without its segments.
type View struct {
	Revision    int64
	Collection  Collection
	Partitions  []Partition        // in id order
	Indexes     []Index            // in id order
	Checkpoints map[int]Checkpoint // by shard; a shard without one is missing
}

// At reads a collection at revision, or at the newest one when that is 0.
func (c *Catalog) At(ctx context.Context, collection, revision int64) (View, error) {
	from := keys.Collection(collection)
	res, err := c.kv.Range(ctx, meta.Range{From: from, Revision: revision})
	if err != nil {
		return View{}, fmt.Errorf("read collection %d: %w", collection, err)
	}
	if revision == 0 {
		revision = res.Revision
	}
	if len(res.KVs) == 0 {
		return View{}, fmt.Errorf("%w: %d", ErrCollectionNotFound, collection)
	}
	v := View{Revision: revision, Checkpoints: map[int]Checkpoint{}}
	if v.Collection, err = DecodeCollection(res.KVs[0]); err != nil {
		return View{}, err
	}
	if v.Partitions, err = readAll(ctx, c.kv, keys.PartitionPrefix(collection), revision, decodePartition); err != nil {
		return View{}, err
	}
	if v.Indexes, err = readAll(ctx, c.kv, keys.IndexPrefix(collection), revision, decodeIndex); err != nil {
		return View{}, err
	}
	checkpoints, err := readAll(ctx, c.kv, keys.ChannelPrefix(collection), revision, decodeCheckpoint)
	if err != nil {
		return View{}, err
	}
	for _, cp := range checkpoints {
		cp.Channel = v.Collection.Channel(cp.Shard)
		v.Checkpoints[cp.Shard] = cp
	}
	if _, set := v.Checkpoints[0]; !set && len(v.Collection.Channels) == 0 {
		// Without a stream, all registered rows are in files.
		v.Checkpoints[0] = Checkpoint{Position: segment.Position{Timestamp: segment.MaxTimestamp}}
	}
	return v, nil
}

// readAll reads a bounded set of records at one revision.
func readAll[T any](
	ctx context.Context, kv meta.KV, prefix string, revision int64, decode func(meta.KeyValue) (T, error),
) ([]T, error) {
	var list []T
	from, to := meta.Prefix(prefix)
	_, err := kv.Scan(ctx, from, to, revision, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			t, err := decode(kv)
			if err != nil {
				return err
			}
			list = append(list, t)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", prefix, err)
	}
	return list, nil
}

func decodeCheckpoint(kv meta.KeyValue) (Checkpoint, error) {
	shard, err := keys.LastID(kv.Key)
	if err != nil {
		return Checkpoint{}, err
	}
	rec := &storagev1.Channel{}
	if err := record.Decode(kv, rec); err != nil {
		return Checkpoint{}, err
	}
	return Checkpoint{Shard: int(shard), Position: positionOf(rec.GetCheckpoint())}, nil
}
