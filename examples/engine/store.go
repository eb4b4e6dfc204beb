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

const root = "engine/" // where the files of collections lie in the object store

// What a segment holds. A delete, only a time and an id, takes away an older row.
const deletes, inserts, compacted = api.Segment_LEVEL_L0, api.Segment_LEVEL_L1, api.Segment_LEVEL_L2

// Row is one row. Times order what happens in one channel, never across two.
type Row struct {
	Time   uint64
	ID     int64
	Vector [16]float32
	Text   [24]byte
}

// columns are the fields of the schema, with ids from 1, in a form that has a
// fixed size. Each is stored in a file of its own; deletes have the first two.
func (r *Row) columns() []any { return []any{&r.Time, &r.ID, r.Vector[:], r.Text[:]} }

// Create makes a collection with two channels.
func Create(ctx context.Context, c *client.Client, name string) error {
	_, err := c.Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
		Name: &api.CollectionName{Name: name}, Channels: []string{"engine-ch-0", "engine-ch-1"},
		Schema: &api.Schema{Fields: []*api.Field{
			{Id: 1, Name: "time", DataType: "UInt64"},
			{Id: 2, Name: "id", DataType: "Int64", PrimaryKey: true},
			{Id: 3, Name: "vector", DataType: "FloatVector"},
			{Id: 4, Name: "text", DataType: "Text"},
		}},
		Roots: []*api.Root{{Store: "default", Prefix: root}}, RequestToken: client.NewRequestToken(),
	})
	return err
}

// Store is an open collection, for one process at a time to write to. A real
// engine has a log of each channel, and reads it from the checkpoint on to begin.
type Store struct {
	catalog    api.CatalogServiceClient // nil: it is a snapshot, to be read only
	collection *api.CollectionRef
	dir        string
	clocks     []uint64                      // by channel, the time of the next row or delete
	growing    []map[api.Segment_Level][]Row // by channel, inserts and deletes that are in memory
}

// Open opens a collection and returns its rows. All that is to be known is in the
// catalog: the engine keeps no metadata of its own.
func Open(ctx context.Context, c *client.Client, dir, name string) (*Store, []Row, error) {
	ref := &api.CollectionRef{Ref: &api.CollectionRef_Name{Name: &api.CollectionName{Name: name}}}
	col, err := c.Catalog.GetCollection(ctx, &api.GetCollectionRequest{Collection: ref})
	if err != nil {
		return nil, nil, err
	}
	ref.Ref = &api.CollectionRef_Id{Id: col.GetCollection().GetId()} // the name may come to stand for another
	checkpoints, err := c.Catalog.ListCheckpoints(ctx, &api.ListCheckpointsRequest{Collection: ref})
	if err != nil {
		return nil, nil, err
	}
	s := &Store{c.Catalog, ref, dir, []uint64{1, 1}, []map[api.Segment_Level][]Row{{}, {}}}
	segments, err := s.segments(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range checkpoints.GetCheckpoints() {
		s.clocks[p.GetShard()] = p.GetPosition().GetTimestamp()
	}
	for _, seg := range segments { // which may be ahead of the checkpoint
		s.clocks[seg.GetShard()] = max(s.clocks[seg.GetShard()], seg.GetDmlPosition().GetTimestamp())
	}
	rows, err := live(dir, segments)
	return s, rows, err
}

// segments is all at one revision: a compaction's inputs or outputs, never both.
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

// OpenSnapshot is Open for a snapshot, whose collection may be gone. What lies
// beyond its cuts, its segments leave out or hide.
func OpenSnapshot(ctx context.Context, c *client.Client, dir, name string) (*Store, []Row, error) {
	var segments []*api.Segment
	ref := &api.SnapshotRef{Ref: &api.SnapshotRef_Name{Name: name}}
	req := &api.ListSnapshotSegmentsRequest{Snapshot: ref, View: api.SegmentView_SEGMENT_VIEW_FILES}
	for {
		page, err := c.Snapshots.ListSnapshotSegments(ctx, req)
		if err != nil {
			return nil, nil, err
		}
		for _, x := range page.GetSegments() {
			segments = append(segments, x.GetSegment())
		}
		if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
			rows, err := live(dir, segments)
			return new(Store), rows, err
		}
	}
}

// Write inserts or deletes a row, in memory. Its id decides its channel.
func (s *Store) Write(what api.Segment_Level, r Row) {
	ch := uint64(r.ID) * 0x9E3779B97F4A7C15 >> 32 % uint64(len(s.clocks))
	r.Time, s.clocks[ch] = s.clocks[ch], s.clocks[ch]+1
	s.growing[ch][what] = append(s.growing[ch][what], r)
}

// Flush makes segments of what is in memory. It may be cut short, and snapshots
// may be taken, at any point, thanks to the order:
//
//  1. Allocate ids. They never come again, so what a crash leaves is in no one's way.
//  2. Write the files, of which nobody knows yet.
//  3. Add the segments. Snapshots hide of them what is beyond the checkpoints.
//  4. Move the checkpoints. Before 3, they would promise rows that are not there.
func (s *Store) Flush(ctx context.Context) error {
	add := &api.AddSegmentsRequest{Collection: s.collection}
	move := &api.SetCheckpointsRequest{Collection: s.collection}
	for ch, clock := range s.clocks {
		for what, rows := range s.growing[ch] {
			seg, err := s.write(ctx, int32(ch), what, rows) // 1 and 2
			if err != nil {
				return err
			}
			add.Segments = append(add.Segments, seg)
		}
		clear(s.growing[ch])
		move.Checkpoints = append(move.Checkpoints, &api.ChannelPosition{Shard: int32(ch), Position: &api.Position{Timestamp: clock}})
	}
	stream, err := s.catalog.AddSegments(ctx)
	if err == nil {
		_ = stream.Send(add) // why it fails is in the answer
		_, err = stream.CloseAndRecv()
	}
	if err == nil {
		_, err = s.catalog.SetCheckpoints(ctx, move)
	}
	return err
}

func (s *Store) allocate(ctx context.Context, n int64) (int64, error) {
	want := &api.AllocateIdsRequest_Count{Count: n}
	resp, err := s.catalog.AllocateIds(ctx, &api.AllocateIdsRequest{Want: want, RequestToken: client.NewRequestToken()})
	return resp.GetIds().GetFirst(), err
}

// write puts rows into files and returns the segment of them, which the catalog
// does not know yet. As all have the same times, a snapshot, which leaves out files
// wholly beyond its cut, has all columns of a row or none.
func (s *Store) write(ctx context.Context, shard int32, what api.Segment_Level, rows []Row) (*api.Segment, error) {
	kinds := []string{"stats", "insert", "insert", "insert", "insert"} // by field; 0 is no one field
	if what == deletes {
		kinds = []string{"stats", "delta", "delta"}
	}
	id, err := s.allocate(ctx, 1+int64(len(kinds))) // of the segment and of each file
	first, last, byID := rows[0].Time, rows[len(rows)-1].Time, func(a, b Row) int { return cmp.Compare(a.ID, b.ID) }
	seg := &api.Segment{
		Id: id, Shard: shard, Level: what, State: api.Segment_STATE_FLUSHED, Rows: int64(len(rows)),
		StartPosition: &api.Position{Timestamp: first}, DmlPosition: &api.Position{Timestamp: last + 1},
	}
	stats := fmt.Sprintf("%d rows, ids %d to %d\n", len(rows), slices.MinFunc(rows, byID).ID, slices.MaxFunc(rows, byID).ID)
	for i := 0; i < len(kinds) && err == nil; i++ {
		content := []byte(stats)
		if i > 0 {
			content = nil
			for r := range rows { // it takes all that has a fixed size
				content, _ = binary.Append(content, binary.LittleEndian, rows[r].columns()[i-1])
			}
		}
		sum, log := sha256.Sum256(content), id+1+int64(i)
		f := &api.File{
			Path: fmt.Sprintf("%d/0/%d/%s/%d/%d", s.collection.GetId(), id, kinds[i], i, log), // in partition 0, which is all
			Kind: kinds[i], FieldId: int64(i), LogId: log, Entries: seg.GetRows(), MinTimestamp: first, MaxTimestamp: last,
			SizeBytes: int64(len(content)), Checksum: &api.Checksum{Type: "SHA256", Value: sum[:]},
		}
		seg.Files = append(seg.Files, f)
		err = write(s.dir, f, content)
	}
	return seg, err
}

// Compact replaces all segments in one step: by one of what is live, per channel.
func (s *Store) Compact(ctx context.Context) error {
	// First the checkpoints pass the deletes that are about to be applied: in a
	// snapshot with its cut before a delete, the row is still to be found.
	if err := s.Flush(ctx); err != nil {
		return err
	}
	segments, err := s.segments(ctx)
	if err != nil {
		return err
	}
	swap := &api.CompactSegmentsRequest{Collection: s.collection, RequestToken: client.NewRequestToken()}
	channels := make([][]*api.Segment, len(s.clocks))
	for _, seg := range segments {
		swap.Inputs = append(swap.Inputs, seg.GetId())
		channels[seg.GetShard()] = append(channels[seg.GetShard()], seg)
	}
	for ch, own := range channels {
		rows, err := live(s.dir, own)
		if err == nil && len(rows) > 0 {
			slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.Time, b.Time) })
			var seg *api.Segment
			seg, err = s.write(ctx, int32(ch), compacted, rows)
			swap.Outputs = append(swap.Outputs, seg)
		}
		if err != nil {
			return err
		}
	}
	_, err = s.catalog.CompactSegments(ctx, swap)
	return err
}

// write returns once the file is there, whole and durable: the catalog is about
// to promise that. On S3 it would be one conditional put.
func write(store string, f *api.File, content []byte) error {
	name := filepath.Join(store, root, f.GetPath())
	dir := filepath.Dir(name)
	_ = os.MkdirAll(dir, 0o750) // if this fails, so does the next
	file, err := os.Create(name + ".tmp")
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(file.Name(), name)
	}
	for ; err == nil && len(dir) >= len(store); dir = filepath.Dir(dir) { // any may be new
		if file, err = os.Open(dir); err == nil {
			err = errors.Join(file.Sync(), file.Close())
		}
	}
	return err
}

// live reads the rows of segments that no delete in them takes away. As no file
// is ever rewritten, row ceilings hide what came after the cut of a snapshot.
func live(store string, segments []*api.Segment) (live []Row, err error) {
	deleted := map[int64]uint64{} // when
	for _, seg := range segments {
		rows := make([]Row, seg.GetRows())
		for _, f := range seg.GetFiles() {
			content, err := os.ReadFile(filepath.Join(store, root, f.GetPath()))
			if sum := sha256.Sum256(content); err != nil || !bytes.Equal(sum[:], f.GetChecksum().GetValue()) {
				return nil, fmt.Errorf("file %s: %w", f.GetPath(), cmp.Or(err, errors.New("not what was written: its checksum differs")))
			}
			for i, in := 0, bytes.NewReader(content); i < len(rows) && f.GetFieldId() > 0; i++ {
				_ = binary.Read(in, binary.LittleEndian, rows[i].columns()[f.GetFieldId()-1]) // whole: its checksum is right
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

// digest is the same for the same rows in any order.
func digest(rows []Row) (sum uint64) {
	for _, r := range rows {
		h := sha256.Sum256(fmt.Append(nil, r.ID, r.Vector, r.Text))
		sum += binary.LittleEndian.Uint64(h[:])
	}
	return sum
}
