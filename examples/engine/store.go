package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// What a segment holds. A delete is a row with only a time and an id: it takes
// away the row with that id that is older.
const deletes, inserts, compacted = api.Segment_LEVEL_L0, api.Segment_LEVEL_L1, api.Segment_LEVEL_L2

// Row is one row. Its time says what came first in its channel; times of two
// channels cannot be compared.
type Row struct {
	Time   uint64
	ID     int64
	Vector [16]float32
	Text   [24]byte
}

// columns are the fields of the schema, with ids from 1. Each is stored in a
// file of its own; deletes have the first two.
var columns = []struct {
	name, dataType string
	value          func(*Row) any // as encoding/binary takes it
}{
	{"time", "UInt64", func(r *Row) any { return &r.Time }},
	{"id", "Int64", func(r *Row) any { return &r.ID }},
	{"vector", "FloatVector", func(r *Row) any { return r.Vector[:] }},
	{"text", "Text", func(r *Row) any { return r.Text[:] }},
}

// Store is a collection that is open for writing, by one process at a time.
type Store struct {
	catalog    api.CatalogServiceClient
	collection *api.CollectionRef
	disk       disk
	channels   []*channel
}

// channel is a stream of rows and deletes, with what is growing in memory. A real
// engine has a log of it, and reads that from the checkpoint on after a crash.
type channel struct {
	shard  int32
	clock  uint64                      // the time of the next row or delete
	memory map[api.Segment_Level][]Row // inserts and deletes
}

// Create makes a collection with two channels.
func Create(ctx context.Context, c *client.Client, name string) error {
	schema := &api.Schema{}
	for i, column := range columns {
		schema.Fields = append(schema.Fields, &api.Field{
			Id: int64(i + 1), Name: column.name, DataType: column.dataType, PrimaryKey: column.name == "id",
		})
	}
	_, err := c.Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
		Name: &api.CollectionName{Name: name}, Schema: schema, Channels: []string{"engine-ch-0", "engine-ch-1"},
		Roots: []*api.Root{{Store: "default", Prefix: "engine/"}}, RequestToken: client.NewRequestToken(),
	})
	return err
}

// Open opens a collection. All that is to be known about it is in the catalog:
// the engine keeps no metadata of its own.
func Open(ctx context.Context, c *client.Client, dir, name string) (*Store, error) {
	ref := &api.CollectionRef{Ref: &api.CollectionRef_Name{Name: &api.CollectionName{Name: name}}}
	col, err := c.Catalog.GetCollection(ctx, &api.GetCollectionRequest{Collection: ref})
	if err != nil {
		return nil, err
	}
	// From here on by id: the name may come to stand for another collection.
	ref = &api.CollectionRef{Ref: &api.CollectionRef_Id{Id: col.GetCollection().GetId()}}
	s := &Store{c.Catalog, ref, newDisk(dir, col.GetCollection()), nil}
	for i := range col.GetCollection().GetChannels() {
		s.channels = append(s.channels, &channel{int32(i), 1, map[api.Segment_Level][]Row{}})
	}
	checkpoints, err := c.Catalog.ListCheckpoints(ctx, &api.ListCheckpointsRequest{Collection: ref})
	if err != nil {
		return nil, err
	}
	for _, p := range checkpoints.GetCheckpoints() {
		s.channels[p.GetShard()].clock = p.GetPosition().GetTimestamp()
	}
	segments, err := s.segments(ctx)
	for _, seg := range segments { // which may be ahead of the checkpoint
		ch := s.channels[seg.GetShard()]
		ch.clock = max(ch.clock, seg.GetDmlPosition().GetTimestamp())
	}
	return s, err
}

// segments returns the segments at one revision of the catalog, which has the
// inputs of a compaction or its outputs, never both.
func (s *Store) segments(ctx context.Context) (all []*api.Segment, err error) {
	stream, err := s.catalog.ExportSegments(ctx, &api.ExportSegmentsRequest{Collection: s.collection})
	for err == nil {
		var part *api.ExportSegmentsResponse
		part, err = stream.Recv()
		all = append(all, part.GetSegments()...)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return all, err
}

// Write inserts or deletes a row, in memory. Its id decides its channel.
func (s *Store) Write(what api.Segment_Level, r Row) {
	ch := s.channels[uint64(r.ID)*0x9E3779B97F4A7C15>>32%uint64(len(s.channels))]
	r.Time, ch.clock = ch.clock, ch.clock+1
	ch.memory[what] = append(ch.memory[what], r)
}

// Flush makes segments of what is in memory. The order lets it be cut short, or
// a snapshot be taken, at any point:
//
//  1. Allocate ids. They never come again, and so neither do paths: what a crash
//     leaves behind is never taken for something else.
//  2. Write the files. Nobody knows of them yet.
//  3. Add the segments. From now on a snapshot may have these files, whole.
//  4. Move the checkpoints. They are the cuts of the next snapshot: before 3 they
//     would promise rows that it does not have. Until now they hid the new rows
//     from it, by row ceilings.
func (s *Store) Flush(ctx context.Context) error {
	add := &api.AddSegmentsRequest{Collection: s.collection}
	move := &api.SetCheckpointsRequest{Collection: s.collection}
	for _, ch := range s.channels {
		for what, rows := range ch.memory {
			seg, err := s.write(ctx, ch.shard, what, rows) // 1 and 2
			if err != nil {
				return err
			}
			add.Segments = append(add.Segments, seg)
		}
		move.Checkpoints = append(move.Checkpoints, &api.ChannelPosition{Shard: ch.shard, Position: &api.Position{Timestamp: ch.clock}})
	}
	stream, err := s.catalog.AddSegments(ctx)
	if err == nil {
		_ = stream.Send(add) // why it fails is in the answer
		_, err = stream.CloseAndRecv()
	}
	if err == nil {
		_, err = s.catalog.SetCheckpoints(ctx, move)
	}
	for _, ch := range s.channels {
		clear(ch.memory)
	}
	return err
}

// allocate returns the first of n new ids.
func (s *Store) allocate(ctx context.Context, n int64) (int64, error) {
	resp, err := s.catalog.AllocateIds(ctx, &api.AllocateIdsRequest{
		Want: &api.AllocateIdsRequest_Count{Count: n}, RequestToken: client.NewRequestToken(),
	})
	return resp.GetIds().GetFirst(), err
}

// write puts rows into files and returns the segment of them, which the catalog
// does not know yet. All files have the same times: a snapshot leaves out those
// that are wholly after its cut, and so it has all columns of a row or none.
func (s *Store) write(ctx context.Context, shard int32, what api.Segment_Level, rows []Row) (*api.Segment, error) {
	kind, stored := "insert", columns
	if what == deletes {
		kind, stored = "delta", columns[:2]
	}
	id, err := s.allocate(ctx, 2+int64(len(stored)))
	if err != nil {
		return nil, err
	}
	n, first, last := int64(len(rows)), rows[0], rows[len(rows)-1]
	seg := &api.Segment{
		Id: id, Shard: shard, Level: what, State: api.Segment_STATE_FLUSHED, Rows: n,
		StartPosition: &api.Position{Timestamp: first.Time}, DmlPosition: &api.Position{Timestamp: last.Time + 1},
	}
	contents := [][]byte{fmt.Appendf(nil, "%d rows from id %d to %d\n", n, slices.MinFunc(rows, byID).ID, slices.MaxFunc(rows, byID).ID)}
	for _, column := range stored {
		var content []byte
		for _, r := range rows {
			if content, err = binary.Append(content, binary.LittleEndian, column.value(&r)); err != nil {
				return nil, err
			}
		}
		contents = append(contents, content)
	}
	for field, content := range contents {
		sum, log := sha256.Sum256(content), id+1+int64(field)
		f := &api.File{
			Kind: kind, FieldId: int64(field), LogId: log, Entries: n, MinTimestamp: first.Time, MaxTimestamp: last.Time,
			SizeBytes: int64(len(content)), Checksum: &api.Checksum{Type: "SHA256", Value: sum[:]},
		}
		if field == 0 {
			f.Kind = "stats"
		}
		f.Path = fmt.Sprintf("%d/0/%d/%s/%d/%d", s.collection.GetId(), id, f.GetKind(), field, log) // partition 0: all
		seg.Files = append(seg.Files, f)
		if err := s.disk.write(f, content); err != nil {
			return nil, err
		}
	}
	return seg, nil
}

// Compact makes one segment of what is live in each channel, and puts these in
// the place of all others in one step. Snapshots of the others keep them.
func (s *Store) Compact(ctx context.Context) error {
	// First the checkpoints have to pass the deletes that are about to be applied:
	// a snapshot whose cut is before a delete still has the row.
	if err := s.Flush(ctx); err != nil {
		return err
	}
	segments, err := s.segments(ctx)
	if err != nil {
		return err
	}
	swap := &api.CompactSegmentsRequest{Collection: s.collection, RequestToken: client.NewRequestToken()}
	of := map[int32][]*api.Segment{} // by shard
	for _, seg := range segments {
		swap.Inputs = append(swap.Inputs, seg.GetId())
		of[seg.GetShard()] = append(of[seg.GetShard()], seg)
	}
	for shard, inputs := range of {
		rows, err := s.disk.live(inputs)
		if err == nil && len(rows) > 0 {
			slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.Time, b.Time) })
			var out *api.Segment
			out, err = s.write(ctx, shard, compacted, rows)
			swap.Outputs = append(swap.Outputs, out)
		}
		if err != nil {
			return err
		}
	}
	_, err = s.catalog.CompactSegments(ctx, swap)
	return err
}

// ReadSnapshot returns the rows of a snapshot, whose collection may be gone. The
// files that the snapshot names, and their row ceilings, stand for its cuts.
func ReadSnapshot(ctx context.Context, c *client.Client, dir, name string) ([]Row, error) {
	ref := &api.SnapshotRef{Ref: &api.SnapshotRef_Name{Name: name}}
	snap, err := c.Snapshots.DescribeSnapshot(ctx, &api.DescribeSnapshotRequest{Snapshot: ref})
	if err != nil {
		return nil, err
	}
	ref.Ref = &api.SnapshotRef_Id{Id: snap.GetSnapshot().GetId()}
	var segments []*api.Segment
	for more := ""; ; {
		page, err := c.Snapshots.ListSnapshotSegments(ctx, &api.ListSnapshotSegmentsRequest{
			Snapshot: ref, View: api.SegmentView_SEGMENT_VIEW_FILES, PageToken: more,
		})
		if err != nil {
			return nil, err
		}
		for _, x := range page.GetSegments() {
			segments = append(segments, x.GetSegment())
		}
		if more = page.GetNextPageToken(); more == "" {
			return newDisk(dir, snap.GetCollection()).live(segments)
		}
	}
}

// disk is the directory that a collection's files lie in: its one root.
type disk string

func newDisk(dir string, col *api.Collection) disk {
	return disk(filepath.Join(dir, col.GetRoots()[0].GetPrefix()))
}

// write returns once the file is there, whole and durable: the catalog is about
// to promise that. On S3 it would be one conditional put.
func (d disk) write(f *api.File, content []byte) error {
	name := filepath.Join(string(d), f.GetPath())
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	file, err := os.Create(name + ".tmp")
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(file.Name(), name)
	}
	for ; err == nil && len(dir) >= len(filepath.Dir(string(d))); dir = filepath.Dir(dir) { // any may be new
		if file, err = os.Open(dir); err == nil {
			err = errors.Join(file.Sync(), file.Close())
		}
	}
	return err
}

// live reads the rows of segments that no delete in them takes away. A row
// ceiling hides rows and deletes. Snapshots have ceilings, and so have
// collections restored from them: no file is ever rewritten, so this is how
// what came after a cut stays out.
func (d disk) live(segments []*api.Segment) (live []Row, err error) {
	deleted := map[int64]uint64{} // when
	for _, seg := range segments {
		rows := make([]Row, seg.GetRows())
		for _, f := range seg.GetFiles() {
			content, err := os.ReadFile(filepath.Join(string(d), f.GetPath()))
			if sum := sha256.Sum256(content); err != nil || !bytes.Equal(sum[:], f.GetChecksum().GetValue()) {
				return nil, fmt.Errorf("file %s: missing, or not what was written: %w", f.GetPath(), err)
			}
			for i, in := 0, bytes.NewReader(content); i < len(rows) && f.GetKind() != "stats"; i++ {
				if err := binary.Read(in, binary.LittleEndian, columns[f.GetFieldId()-1].value(&rows[i])); err != nil {
					return nil, err
				}
			}
		}
		for _, r := range rows {
			switch ceiling := seg.GetRowCeiling(); {
			case ceiling != 0 && r.Time >= ceiling: // hidden
			case seg.GetLevel() == deletes:
				deleted[r.ID] = max(deleted[r.ID], r.Time)
			default:
				live = append(live, r)
			}
		}
	}
	return slices.DeleteFunc(live, func(r Row) bool { return r.Time < deleted[r.ID] }), nil
}
