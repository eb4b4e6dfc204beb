package main

import (
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

const root = "engine/" // of the files of all collections in the object store

// The content of a segment. A delete, only a time and an id, removes an older row.
const deletes, inserts, compacted = api.Segment_LEVEL_L0, api.Segment_LEVEL_L1, api.Segment_LEVEL_L2

// Row is one row. Times order the changes of one channel, not across channels.
type Row struct {
	Time   uint64
	ID     int64
	Vector [16]float32
	Text   [24]byte
}

// Create makes a collection with two channels.
func Create(ctx context.Context, c *client.Client, name string) error {
	_, err := c.Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
		Name: &api.CollectionName{Name: name}, Channels: []string{"engine-ch-0", "engine-ch-1"},
		Schema: &api.Schema{Fields: []*api.Field{
			{Id: 1, Name: "time", DataType: "UInt64"},
			{Id: 2, Name: "id", DataType: "Int64", PrimaryKey: true},
			{Id: 3, Name: "vector", DataType: "FloatVector"},
			{Id: 4, Name: "text", DataType: "Text"},
		}}, Roots: []*api.Root{{Store: "default", Prefix: root}}, RequestToken: client.NewRequestToken(),
	})
	return err
}

// Store is an open collection, for one process to write to. A real one reads its log.
type Store struct {
	c          *client.Client // nil for a snapshot, which is read-only
	collection *api.CollectionRef
	dir        string
	clocks     []uint64                      // by channel, the time of the next row or delete
	growing    []map[api.Segment_Level][]Row // by channel, inserts and deletes in memory
}

// Open opens a collection and returns its rows. All its metadata is in the catalog.
func Open(ctx context.Context, c *client.Client, dir, name string) (*Store, []Row, error) {
	ref := &api.CollectionRef{Ref: &api.CollectionRef_Name{Name: &api.CollectionName{Name: name}}}
	col, err := c.Catalog.GetCollection(ctx, &api.GetCollectionRequest{Collection: ref})
	if err != nil {
		return nil, nil, err
	}
	ref.Ref = &api.CollectionRef_Id{Id: col.GetCollection().GetId()} // the name may move to another collection
	s := &Store{c, ref, dir, []uint64{1, 1}, []map[api.Segment_Level][]Row{{}, {}}}
	checkpoints, err := c.Catalog.ListCheckpoints(ctx, &api.ListCheckpointsRequest{Collection: ref})
	segments, err2 := s.segments(ctx)
	for _, p := range checkpoints.GetCheckpoints() {
		s.clocks[p.GetShard()] = p.GetPosition().GetTimestamp()
	}
	for _, seg := range segments { // may be ahead of the checkpoint
		s.clocks[seg.GetShard()] = max(s.clocks[seg.GetShard()], seg.GetDmlPosition().GetTimestamp())
	}
	rows, err3 := live(dir, segments)
	return s, rows, cmp.Or(err, err2, err3)
}

// Await opens a collection on the event of its creation; a restored one appears whole.
func Await(ctx context.Context, c *client.Client, dir, name string) (s *Store, rows []Row, err error) {
	opened := errors.New("opened")
	err = client.WatchEvents(ctx, c.Events, &api.WatchEventsRequest{}, func(m *api.WatchEventsResponse) (err error) {
		if e := m.GetCollection(); e.GetType() == api.ChangeType_CHANGE_TYPE_CREATED && e.GetCollection().GetName() == name {
			s, rows, err = Open(ctx, c, dir, name)
			return cmp.Or(err, opened)
		} else if m.GetBookmark() != nil { // from here on no event is missed
			fmt.Fprintln(os.Stderr, "engine: waiting for", name)
		}
		return nil
	})
	if errors.Is(err, opened) {
		err = nil
	}
	return s, rows, err
}

// segments returns all segments at one revision: inputs or outputs of a compaction, never both.
func (s *Store) segments(ctx context.Context) (all []*api.Segment, err error) {
	stream, err := s.c.Catalog.ExportSegments(ctx, &api.ExportSegmentsRequest{Collection: s.collection})
	for part := (*api.ExportSegmentsResponse)(nil); err == nil; part, err = stream.Recv() {
		all = append(all, part.GetSegments()...)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return all, err
}

// OpenSnapshot is Open for a snapshot, whose collection may be dropped.
func OpenSnapshot(ctx context.Context, c *client.Client, dir, name string) (*Store, []Row, error) {
	var segments []*api.Segment
	req := &api.ListSnapshotSegmentsRequest{
		Snapshot: &api.SnapshotRef{Ref: &api.SnapshotRef_Name{Name: name}}, View: api.SegmentView_SEGMENT_VIEW_FILES,
	}
	for {
		page, err := c.Snapshots.ListSnapshotSegments(ctx, req)
		for _, x := range page.GetSegments() {
			segments = append(segments, x.GetSegment())
		}
		if req.PageToken = page.GetNextPageToken(); err != nil || req.GetPageToken() == "" {
			rows, err2 := live(dir, segments)
			return new(Store), rows, cmp.Or(err, err2)
		}
	}
}

// Write inserts or deletes a row, in memory. Its id decides its channel.
func (s *Store) Write(what api.Segment_Level, r Row) {
	ch := uint64(r.ID) * 0x9E3779B97F4A7C15 >> 32 % uint64(len(s.clocks))
	r.Time, s.clocks[ch] = s.clocks[ch], s.clocks[ch]+1
	s.growing[ch][what] = append(s.growing[ch][what], r)
}

// Flush writes the rows in memory as segments, in an order that is safe for crashes and snapshots:
//
//  1. Allocate ids. They are never reused, so files left by a crash do no harm.
//  2. Write the files. They are not registered yet.
//  3. Add the segments. Snapshots hide their rows beyond the checkpoints.
//  4. Move the checkpoints. Before 3, they would promise unregistered rows.
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
		move.Checkpoints = append(move.Checkpoints, &api.ChannelPosition{
			Shard: int32(ch), Position: &api.Position{Timestamp: clock},
		})
	}
	stream, err := s.c.Catalog.AddSegments(ctx)
	if err == nil {
		_ = stream.Send(add) // the response has the error
		_, err = stream.CloseAndRecv()
	}
	if err == nil {
		_, err = s.c.Catalog.SetCheckpoints(ctx, move)
	}
	return err
}

func (s *Store) allocate(ctx context.Context, n int64) (int64, error) {
	resp, err := s.c.Catalog.AllocateIds(ctx, &api.AllocateIdsRequest{
		Want: &api.AllocateIdsRequest_Count{Count: n}, RequestToken: client.NewRequestToken(),
	})
	return resp.GetIds().GetFirst(), err
}

// write writes a durable file of rows and returns its segment.
func (s *Store) write(ctx context.Context, shard int32, what api.Segment_Level, rows []Row) (*api.Segment, error) {
	id, err := s.allocate(ctx, 2) // of the segment and of its file
	if err != nil {
		return nil, err
	}
	content, _ := binary.Append(nil, binary.LittleEndian, rows) // a row has a fixed size
	first, last, n, sum := rows[0].Time, rows[len(rows)-1].Time, int64(len(rows)), sha256.Sum256(content)
	kind := map[api.Segment_Level]string{deletes: "delta", inserts: "insert", compacted: "insert"}[what]
	path := fmt.Sprintf("%d/0/%d/%s/0/%d", s.collection.GetId(), id, kind, id+1) // as a restore names it
	dir := filepath.Dir(filepath.Join(s.dir, root, path))
	_ = os.MkdirAll(dir, 0o750) // an error shows in the next call
	file, err := os.Create(filepath.Join(s.dir, root, path))
	_, err2 := file.Write(content)
	err = cmp.Or(err, err2, file.Sync(), file.Close())
	for ; err == nil && len(dir) >= len(s.dir); dir = filepath.Dir(dir) { // any folder may be new
		file, err = os.Open(dir)
		err = cmp.Or(err, file.Sync(), file.Close())
	}
	return &api.Segment{
		Id: id, Shard: shard, Level: what, State: api.Segment_STATE_FLUSHED, Rows: n,
		StartPosition: &api.Position{Timestamp: first}, DmlPosition: &api.Position{Timestamp: last + 1},
		Files: []*api.File{{
			Path: path, Kind: kind, LogId: id + 1, Entries: n, MinTimestamp: first, MaxTimestamp: last,
			SizeBytes: int64(len(content)), Checksum: &api.Checksum{Type: "SHA256", Value: sum[:]},
		}},
	}, err
}

// Compact replaces all segments by one of the live rows per channel, in one step.
func (s *Store) Compact(ctx context.Context) error {
	err := s.Flush(ctx) // the checkpoints first: a snapshot cut before a delete still needs the row
	segments, err2 := s.segments(ctx)
	err = cmp.Or(err, err2)
	change := &api.CompactSegmentsRequest{Collection: s.collection, RequestToken: client.NewRequestToken()}
	channels := make([][]*api.Segment, len(s.clocks))
	for _, seg := range segments {
		change.Inputs = append(change.Inputs, seg.GetId())
		channels[seg.GetShard()] = append(channels[seg.GetShard()], seg)
	}
	for ch := 0; ch < len(channels) && err == nil; ch++ {
		var rows []Row
		if rows, err = live(s.dir, channels[ch]); err == nil && len(rows) > 0 {
			slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.Time, b.Time) })
			seg, err2 := s.write(ctx, int32(ch), compacted, rows)
			err, change.Outputs = err2, append(change.Outputs, seg)
		}
	}
	if err == nil {
		_, err = s.c.Catalog.CompactSegments(ctx, change)
	}
	return err
}

// Collect deletes the files of dropped segments that no snapshot holds, and returns their
// number, and the number held by each snapshot. After a crash the next call continues:
//
//  1. Request all files. Held ones stay; the next call requests them again.
//  2. Delete all files that are granted and not confirmed, also from earlier calls.
//  3. Confirm. Before 2, this would leave unknown files.
func (s *Store) Collect(ctx context.Context) (deleted int, held map[string]int, err error) {
	dir, deleter, held := filepath.Join(s.dir, root), api.Deleter_DELETER_CALLER, map[string]int{}
	names, _ := filepath.Glob(filepath.Join(dir, fmt.Sprint(s.collection.GetId()), "0", "*", "*", "*", "*"))
	var units []*api.Unit // an engine with its own metadata knows the dropped ones
	for _, name := range names {
		path, _ := filepath.Rel(dir, name)
		units = append(units, &api.Unit{Unit: &api.Unit_File{File: &api.UnitFile{Path: path}}})
	}
	for part := range slices.Chunk(units, 10_000) {
		resp, err2 := s.c.Reclaim.Reclaim(ctx, &api.ReclaimRequest{Collection: s.collection, Units: part, Deleter: deleter})
		err = cmp.Or(err, err2)
		for _, r := range resp.GetResults() {
			for _, h := range r.GetHolders() {
				held[h.GetSnapshot().GetName()]++
			}
		}
	}
	for err == nil {
		list, listErr := s.c.Reclaim.ListTombstones(ctx, &api.ListTombstonesRequest{
			Collection: s.collection, Deleter: deleter,
		})
		if listErr != nil || len(list.GetTombstones()) == 0 {
			return deleted, held, listErr
		}
		done := &api.ConfirmReclaimedRequest{Collection: s.collection}
		for _, t := range list.GetTombstones() {
			for _, f := range t.GetFiles() {
				err = cmp.Or(err, os.RemoveAll(filepath.Join(s.dir, f.GetKey()))) // may be deleted already
				deleted++
			}
			done.TombstoneIds = append(done.TombstoneIds, t.GetId())
		}
		if err == nil {
			_, err = s.c.Reclaim.ConfirmReclaimed(ctx, done)
		}
	}
	return deleted, held, err
}

// live reads the rows of segments that no delete removes and no row ceiling hides.
func live(store string, segments []*api.Segment) (live []Row, err error) {
	deleted := map[int64]uint64{} // when
	for _, seg := range segments {
		rows := make([]Row, seg.GetRows())
		for _, f := range seg.GetFiles() {
			content, err := os.ReadFile(filepath.Join(store, root, f.GetPath()))
			if sum := sha256.Sum256(content); err != nil || string(sum[:]) != string(f.GetChecksum().GetValue()) {
				return nil, fmt.Errorf("file %s: %w", f.GetPath(), cmp.Or(err, errors.New("checksum mismatch")))
			}
			_, _ = binary.Decode(content, binary.LittleEndian, rows) // complete: the checksum matches
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

// digest does not depend on the order of rows.
func digest(rows []Row) (sum uint64) {
	for _, r := range rows {
		h := sha256.Sum256(fmt.Append(nil, r.ID, r.Vector, r.Text))
		sum += binary.LittleEndian.Uint64(h[:])
	}
	return sum
}
