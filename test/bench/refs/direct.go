//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/bench"
)

// copier writes copies of a snapshot with the encoders of snapshotd: the records and
// objects that a load of references reads.
type copier struct {
	kv       *etcd.Client
	objects  *file.Store
	record   *storagev1.Snapshot
	metadata *manifest.Metadata
}

// newCopier reads the original snapshot.
func newCopier(ctx context.Context, cl *cluster, col *collection, snapshot int64) (*copier, error) {
	c := &copier{record: &storagev1.Snapshot{}}
	var err error
	if c.kv, err = etcd.Open(etcd.Options{Endpoints: []string{cl.at}, Root: etcdRoot}); err != nil {
		return nil, err
	}
	kv, _, _, err := c.kv.Get(ctx, keys.Snapshot(snapshot))
	if err == nil {
		err = record.Decode(kv, c.record)
	}
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(cl.objects(), manifest.Dir(col.id, snapshot), manifest.MetadataName))
	if err != nil {
		return nil, err
	}
	if c.metadata, err = manifest.DecodeMetadata(data); err != nil {
		return nil, err
	}
	c.objects, err = file.Open(cl.objects(), file.Options{Shared: true}) //nolint:contextcheck // a local directory
	return c, err
}

// put writes a snapshot that references segments and builds.
func (c *copier) put(ctx context.Context, id int64, name string, segments, builds []int64) error {
	refs := &manifest.Refs{Segments: segments, Builds: builds}
	data, err := manifest.EncodeRefs(refs)
	if err != nil {
		return err
	}
	rec, ok := proto.Clone(c.record).(*storagev1.Snapshot)
	if !ok {
		return fmt.Errorf("a copy of a %T is another", c.record)
	}
	md := *c.metadata
	md.Snapshot.ID, md.Snapshot.Name = id, name
	md.Refs.Digest = manifest.Sum(data)
	text, err := manifest.EncodeMetadata(&md)
	if err != nil {
		return err
	}
	dir := manifest.Dir(rec.GetCollectionId(), id)
	for object, body := range map[string][]byte{manifest.RefsName: data, manifest.MetadataName: text} {
		if _, err := c.objects.Create(ctx, dir+object, body); err != nil {
			return err
		}
	}
	sum := manifest.Sum(text)
	rec.Name, rec.MetadataLength, rec.MetadataSha256 = name, sum.Length, sum.SHA256[:]
	rec.References.Length, rec.References.Sha256 = md.Refs.Length, md.Refs.SHA256[:]
	rec.References.Segments, rec.References.Builds = int64(len(segments)), int64(len(builds))
	_, err = c.kv.Txn(ctx, meta.Txn{Then: []meta.Op{
		meta.Put(keys.SnapshotName(0, name), record.Encode(&storagev1.Name{Format: record.Format, Id: id})),
		meta.Put(keys.Snapshot(id), record.Encode(rec)),
		meta.Put(
			keys.Generation(rec.GetCollectionId()),
			record.Encode(&storagev1.Generation{Format: record.Format, SnapshotId: id}),
		),
	}})
	return err
}

// fillDirectly makes a collection as fill does, but has snapshotd take only the
// first snapshot and writes the others itself. Of the segments that are in these
// nothing is in the catalog but those of the first snapshot, which are dropped
// as they would be; those that the collection has in the end are in no snapshot.
func (e *env) fillDirectly(ctx context.Context, cl *cluster) (*collection, error) {
	col, err := newCollection(ctx, cl.client)
	if err != nil {
		return nil, err
	}
	if col.live, err = register(ctx, cl.client, col, e.segments, full); err != nil {
		return nil, err
	}
	first, err := create(ctx, cl.client, col, "s0")
	if err != nil {
		return nil, err
	}
	c, err := newCopier(ctx, cl, col, first)
	if err != nil {
		return nil, err
	}
	defer func() { _, _ = c.kv.Close(), c.objects.Close() }()
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(writers)
	random := rand.New(rand.NewPCG(e.seed, 0))
	held, build := slices.Clone(col.live), map[int64]int64{}
	for i, id := range col.live { // as newSegments numbers them
		build[id] = col.live[0] + int64(len(col.live)+i)
	}
	col.noted(held)
	for i := range e.snapshots - 1 {
		n := e.replaced()
		ids, err := cl.client.Catalog.AllocateIds(groupCtx, &snapshotdv1.AllocateIdsRequest{
			Want: &snapshotdv1.AllocateIdsRequest_Count{Count: int64(2*n + 1)}, RequestToken: client.NewRequestToken(),
		})
		if err != nil {
			return nil, fmt.Errorf("allocate ids: %w", errors.Join(err, group.Wait()))
		}
		at := ids.GetIds().GetFirst()
		random.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
		for k := range n {
			delete(build, held[k])
			held[k] = at + int64(k)
			build[held[k]] = at + int64(n+k)
		}
		col.noted(held[:n])
		segments := slices.Sorted(slices.Values(held))
		builds := slices.Sorted(maps.Values(build))
		group.Go(func() error { return c.put(groupCtx, at+int64(2*n), fmt.Sprintf("s%d", i+1), segments, builds) })
		if (i+2)%forgetEvery == 0 {
			e.Logf("%d snapshots, load %.2f", i+2, bench.Load())
		}
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if err := bench.DropSegments(ctx, cl.client, col.ref(), col.live); err != nil {
		return nil, err
	}
	col.dropped = col.live
	col.live, err = register(ctx, cl.client, col, e.segments, slim)
	return col, err
}
