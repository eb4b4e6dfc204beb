//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	filesEach = 12  // per deleted segment
	fileSize  = 64  // bytes
	field     = 100 // the first; each file is of another, as a segment of 12 columns has them
	rows      = 1000
	writers   = 4 // goroutines that make files

	// firstTimestamp is in the form of a hybrid clock: milliseconds, and 18 bits
	// of a counter.
	firstTimestamp = uint64(1_790_000_000_000) << 18
	lastTimestamp  = firstTimestamp + 1<<40
)

// set has the files of segments with consecutive ids.
type set struct {
	Prefix                string // before the paths
	Collection, Partition int64
	First                 int64 // segment
	Segments, Each        int
}

// file returns the path of the nth file of a segment, in the native layout.
func (s *set) file(id int64, n int) string {
	return fmt.Sprintf("%d/%d/%d/insert/%d/%d", s.Collection, s.Partition, id, field+n, id*64+int64(n))
}

// keys yields the keys of the objects with their index.
func (s *set) keys() iter.Seq2[int, string] {
	return func(yield func(int, string) bool) {
		for i := range s.Segments * s.Each {
			if !yield(i, s.Prefix+s.file(s.First+int64(i/s.Each), i%s.Each)) {
				return
			}
		}
	}
}

// segments returns the segments for the catalog.
func (s *set) segments() []*snapshotdv1.Segment {
	list := make([]*snapshotdv1.Segment, s.Segments)
	for i := range list {
		id := s.First + int64(i)
		seg := &snapshotdv1.Segment{
			Id:             id,
			PartitionId:    s.Partition,
			Rows:           rows,
			StorageVersion: 2,
			StartPosition: &snapshotdv1.Position{
				Timestamp: firstTimestamp,
			},
			DmlPosition: &snapshotdv1.Position{Timestamp: lastTimestamp},
		}
		for n := range s.Each {
			seg.Files = append(seg.Files, &snapshotdv1.File{
				Path:         s.file(id, n),
				Kind:         "insert",
				FieldId:      field + int64(n),
				LogId:        id*64 + int64(n),
				SizeBytes:    fileSize,
				MinTimestamp: firstTimestamp,
				MaxTimestamp: lastTimestamp - 1,
				Entries:      rows,
				Etag:         fmt.Sprintf("%032x", id*64+int64(n)),
			})
		}
		list[i] = seg
	}
	return list
}

// attributes are versitygw's extended attributes of an object. They are optional for
// a delete, so objects lack them on a file system without extended attributes.
var attributes = map[string]string{
	"user.metadata":     "{}",
	"user.content-type": "application/octet-stream",
	"user.checksums":    `{"algorithm":"CRC64NVME","crc64nvme":"AAAAAAAAAAA="}`,
}

// put writes an object as a file into versitygw's directory.
func put(name string, body []byte, etag string) error {
	if err := os.WriteFile(name, body, 0o600); err != nil {
		return err
	}
	err := syscall.Setxattr(name, "user.etag", []byte(etag), 0)
	for attr, value := range attributes {
		if err == nil {
			err = syscall.Setxattr(name, attr, []byte(value), 0)
		}
	}
	if errors.Is(err, syscall.ENOTSUP) {
		return nil
	}
	return err
}

// write writes the objects of a set.
func (e *env) write(ctx context.Context, s *set) error {
	body := make([]byte, fileSize)
	group, ctx := errgroup.WithContext(ctx)
	for first := range writers {
		group.Go(func() error {
			for i := first; i < s.Segments; i += writers {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				id := s.First + int64(i)
				for n := range s.Each {
					if err := os.MkdirAll(filepath.Dir(e.path(s.Prefix+s.file(id, n))), 0o700); err != nil {
						return err
					}
					if err := put(e.path(s.Prefix+s.file(id, n)), body, fmt.Sprintf("%032x", id*64+int64(n))); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// left returns an error if the prefix has an object.
func (e *env) left(prefix string) error {
	n := 0
	err := filepath.WalkDir(e.path(prefix), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			n++
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil && n > 0 {
		err = fmt.Errorf("%d objects are left below %s", n, prefix)
	}
	return err
}

// collection is a collection of the benchmark.
type collection struct {
	ref  *snapshotdv1.CollectionRef
	id   int64
	name string
	set  set // of its segments
}

// newCollection creates a collection of segments with each files per segment. The
// files exist only if written is true.
func (e *env) newCollection(ctx context.Context, segments, each int, written bool) (*collection, error) {
	c := &collection{name: e.Name()}
	made, err := e.client.Catalog.CreateCollection(ctx, &snapshotdv1.CreateCollectionRequest{
		Name: &snapshotdv1.CollectionName{Name: c.name}, Channels: []string{c.name + "-0"},
		Roots:        []*snapshotdv1.Root{{Prefix: "data/" + c.name + "/"}},
		RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	c.id = made.GetCollection().GetId()
	c.ref = &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: c.id}}
	p, err := e.client.Catalog.CreatePartition(ctx, &snapshotdv1.CreatePartitionRequest{
		Collection: c.ref, Name: "p", RequestToken: client.NewRequestToken(),
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
	if _, err := e.client.Catalog.SetCheckpoints(ctx, &snapshotdv1.SetCheckpointsRequest{
		Collection:  c.ref,
		Checkpoints: []*snapshotdv1.ChannelPosition{{Position: &snapshotdv1.Position{Timestamp: lastTimestamp}}},
	}); err != nil {
		return nil, err
	}
	c.set = set{
		Prefix: "data/" + c.name + "/", Collection: c.id, Partition: p.GetPartition().GetId(),
		First: ids.GetIds().GetFirst(), Segments: segments, Each: each,
	}
	if written {
		if err := e.write(ctx, &c.set); err != nil {
			return nil, err
		}
	}
	return c, bench.AddSegments(ctx, e.client, c.ref, c.set.segments())
}

// dropSegments drops the first n segments of a collection.
func (e *env) dropSegments(ctx context.Context, c *collection, n int) error {
	ids := make([]int64, n)
	for i := range ids {
		ids[i] = c.set.First + int64(i)
	}
	return bench.DropSegments(ctx, e.client, c.ref, ids)
}

// forgetFiles removes the empty directories that versitygw may leave.
func (e *env) forgetFiles(prefix string) error {
	return os.RemoveAll(strings.TrimSuffix(e.path(prefix), "/"))
}
