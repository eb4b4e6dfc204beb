//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

const (
	root     = "engine/" // prefix of the files of collections
	taskSize = 32        // segments of one task of a restore
	spareIDs = 20        // allocated and not used yet
	deadIDs  = 5         // allocated and never used
)

// The names in the base of every case.
const (
	shop = "shop" // a collection of two tasks; keep and old are snapshots of it
	mall = "mall" // a small collection without snapshots
	keep = "keep"
	old  = "old" // alone holds one segment, which is spilled
	// huge is a collection with an object that is copied in parts, and a snapshot of
	// it. Only cases of huge scenarios have it.
	huge = "huge"
)

// seg is a segment as the harness made it.
type seg struct {
	ID        int64 // 0: any
	Partition string
	Files     []string // SHA-256 of each content, in the order of the segment's files and builds
}

// ledger is the expected state, as the harness made it. Only ids come from snapshotd.
type ledger struct {
	Collections map[string][]seg // live segments, by the collection's name
	Snapshots   map[string][]seg // by name
	Pins        int
	Pin         int64            // of keep, with a ttl
	Restored    map[string]bool  // collections that restores made
	Collection  map[string]int64 // ids by name, of collections in use
	Old         int64            // the segment that old alone holds
	Spare       []int64          // ids to use
	Dead        []int64          // ids without a record
	Late        string           // path of a file of a removed restored segment
	IDs         map[int64]string // every allocated id, and its use
}

func (l *ledger) clone() *ledger {
	n := *l
	n.Collections, n.Snapshots, n.Restored = maps.Clone(l.Collections), maps.Clone(l.Snapshots), maps.Clone(l.Restored)
	n.Collection, n.IDs = maps.Clone(l.Collection), maps.Clone(l.IDs)
	n.Spare, n.Dead = slices.Clone(l.Spare), slices.Clone(l.Dead)
	return &n
}

// env is a data directory, a snapshotd on it, and the expected state.
type env struct {
	*ledger
	bin, dir string
	settings string
	buckets  *buckets // nil: the store is a directory
	bucket   string
	s        *server
	starts   int
	base     *env           // what it is a copy of; nil: none
	answers  map[string]any // of the first call, to compare the repeat with
	crashes  []crash        // planned and past ones
	armed    bool           // a crash is due, so calls may fail
	asked    int            // earlier calls of the operation
}

func (e *env) c() *client.Client { return e.s.c }

// start starts snapshotd and waits until it serves, or until it dies if it may.
func (e *env) start(ctx context.Context, how start) error {
	e.starts++
	settings := e.settings
	if e.buckets != nil {
		settings += e.buckets.settings(e.bucket)
	}
	var err error
	e.s, err = startServer(
		ctx,
		e.bin,
		e.dir,
		settings,
		how,
		filepath.Join(e.dir, fmt.Sprintf("snapshotd-%d.log", e.starts)),
	)
	if err != nil {
		return err
	}
	if err := e.s.serves(ctx); err != nil && (how.at == "" || !errors.Is(err, errEnded)) {
		return err
	}
	return nil
}

// objects returns a path below the object store.
func (e *env) objects(elem ...string) string {
	store := filepath.Join(e.dir, "data", "objects")
	if e.buckets != nil {
		store = filepath.Join(e.buckets.dir, e.bucket)
	}
	return filepath.Join(append([]string{store}, elem...)...)
}

// claimID records the use of an id. It fails when the id has another use.
func (e *env) claimID(id int64, what string) error {
	if before, ok := e.IDs[id]; ok && before != what {
		return fmt.Errorf("id %d was allocated twice: for %s and for %s", id, before, what)
	}
	e.IDs[id] = what
	return nil
}

// same compares an answer with the first answer of the case.
func (e *env) same(what string, answer any) error {
	if before, ok := e.answers[what]; ok && before != answer {
		return fmt.Errorf("the repeat has another %s: %v, first %v", what, answer, before)
	}
	e.answers[what] = answer
	return nil
}

// allocate returns n ids in a row.
func (e *env) allocate(ctx context.Context, n int64, token, what string) ([]int64, error) {
	resp, err := e.c().Catalog.AllocateIds(
		ctx,
		&api.AllocateIdsRequest{Want: &api.AllocateIdsRequest_Count{Count: n}, RequestToken: token},
	)
	if err != nil {
		return nil, err
	}
	ids := make([]int64, n)
	for i := range ids {
		ids[i] = resp.GetIds().GetFirst() + int64(i)
		if err := e.claimID(ids[i], fmt.Sprintf("%s %d of allocation %s", what, i, token)); err != nil {
			return nil, err
		}
	}
	return ids, nil
}

// byName refers to a collection.
func byName(name string) *api.CollectionRef {
	return &api.CollectionRef{Ref: &api.CollectionRef_Name{Name: &api.CollectionName{Name: name}}}
}

// snapshot refers to a snapshot.
func snapshot(name string) *api.SnapshotRef {
	return &api.SnapshotRef{Ref: &api.SnapshotRef_Name{Name: name}}
}

func sum(content []byte) string {
	h := sha256.Sum256(content)
	return hex.EncodeToString(h[:8])
}

// hugeSums caches the sums of huge files by inode and time: files of a bucket are
// never changed in place.
var hugeSums sync.Map

// sumFile returns the sum of a file's content.
func sumFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // it is only read
	stat, err := f.Stat()
	if err != nil {
		return "", err
	}
	of := [2]int64{
		int64(stat.Sys().(*syscall.Stat_t).Ino),
		stat.ModTime().UnixNano(),
	} //nolint:gosec // as good as any number
	if had, ok := hugeSums.Load(of); ok && stat.Size() == hugeSize {
		return had.(string), nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	text := hex.EncodeToString(h.Sum(nil)[:8])
	if stat.Size() == hugeSize {
		hugeSums.Store(of, text)
	}
	return text, nil
}

// shape describes a segment to make.
type shape struct {
	partition string
	big       bool  // its record takes much of a transaction
	index     int64 // of its build; 0: none
	huge      bool  // its file is copied in parts
	large     bool  // its record fills a third of a transaction and more
}

// segment writes the files of a segment. It returns the segment for registration and
// for the ledger. It uses three ids.
func (e *env) segment(
	ctx context.Context,
	collection int64,
	partitions map[string]int64,
	ids []int64,
	s shape,
) (*api.Segment, seg, error) {
	known := seg{ID: ids[0], Partition: s.partition}
	file := func(path, kind string) (*api.File, error) {
		content := fmt.Appendf(nil, "%s\n%s", path, strings.Repeat(kind+" ", 40+int(ids[0]%50)))
		if s.huge && kind == "insert" {
			content = filled(hugeSize)
		}
		known.Files = append(known.Files, sum(content))
		return &api.File{
				Path:         path,
				Kind:         kind,
				LogId:        ids[1],
				Entries:      1,
				MinTimestamp: 1,
				MaxTimestamp: 9,
				SizeBytes:    int64(len(content)),
			},
			e.put(
				ctx,
				root+path,
				content,
			)
	}
	data, err := file(fmt.Sprintf("%d/0/%d/insert/0/%d", collection, ids[0], ids[1]), "insert")
	if err != nil {
		return nil, seg{}, err
	}
	out := &api.Segment{
		Id:            ids[0],
		PartitionId:   partitions[s.partition],
		Level:         api.Segment_LEVEL_L1,
		State:         api.Segment_STATE_FLUSHED,
		Rows:          1,
		StartPosition: &api.Position{Timestamp: 1},
		DmlPosition:   &api.Position{Timestamp: 10},
		Files:         []*api.File{data},
	}
	if s.big {
		out.EngineData = []byte(strings.Repeat("engine data ", 1<<14/12))
		out.Attributes = map[string]string{
			"a": strings.Repeat("a", 4096),
			"b": strings.Repeat("b", 4096),
			"c": strings.Repeat("c", 4096),
		}
	}
	if s.large {
		out.Attributes, data.Attributes = map[string]string{}, map[string]string{}
		for i := range 64 {
			out.Attributes[fmt.Sprint(i)], data.Attributes[fmt.Sprint(i)] = strings.Repeat("a", 4096), strings.Repeat("b", 4096)
		}
	}
	if s.index != 0 {
		built, err := file(fmt.Sprintf("%d/0/%d/index/%d/%d", collection, ids[0], ids[2], ids[1]), "index")
		if err != nil {
			return nil, seg{}, err
		}
		out.IndexBuilds = []*api.IndexBuild{{Id: ids[2], IndexId: s.index, FieldId: 1, Files: []*api.File{built}}}
	}
	return out, known, nil
}

// collection makes a collection with two partitions, main and small, an index and
// segments: the first has a build of the index, the last two are in small.
func (e *env) collection(ctx context.Context, name string, segments, big int) error {
	made, err := e.c().Catalog.CreateCollection(ctx, &api.CreateCollectionRequest{
		Name: &api.CollectionName{Name: name}, Channels: []string{name + "-channel"},
		Schema: &api.Schema{Fields: []*api.Field{{Id: 1, Name: "id", DataType: "Int64", PrimaryKey: true}}},
		Roots:  []*api.Root{{Store: "default", Prefix: root}}, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return err
	}
	id := made.GetCollection().GetId()
	e.Collection[name] = id
	partitions := map[string]int64{}
	for _, p := range []string{"main", "small"} {
		got, err := e.c().Catalog.CreatePartition(
			ctx,
			&api.CreatePartitionRequest{Collection: byName(name), Name: p, RequestToken: client.NewRequestToken()},
		)
		if err != nil {
			return err
		}
		partitions[p] = got.GetPartition().GetId()
	}
	index, err := e.c().Catalog.CreateIndex(
		ctx,
		&api.CreateIndexRequest{Collection: byName(name), Name: "by-id", FieldId: 1, RequestToken: client.NewRequestToken()},
	)
	if err != nil {
		return err
	}
	for what, id := range map[string]int64{
		"collection": id, "partition main": partitions["main"], "partition small": partitions["small"],
		"index": index.GetIndex().GetId(),
	} {
		if err := e.claimID(id, what+" of "+name); err != nil {
			return err
		}
	}
	ids, err := e.allocate(ctx, int64(3*segments), client.NewRequestToken(), "segment of "+name)
	if err != nil {
		return err
	}
	add := &api.AddSegmentsRequest{Collection: byName(name)}
	for i := range segments {
		s := shape{partition: "main", big: i < big, huge: name == huge && i == 0}
		if i == 0 {
			s.index = index.GetIndex().GetId()
		}
		if i >= segments-2 {
			s.partition = "small"
		}
		one, known, err := e.segment(ctx, id, partitions, ids[3*i:3*i+3], s)
		if err != nil {
			return err
		}
		add.Segments = append(add.Segments, one)
		e.Collections[name] = append(e.Collections[name], known)
	}
	stream, err := e.c().Catalog.AddSegments(ctx)
	if err != nil {
		return err
	}
	_ = stream.Send(add) // the answer has its error
	if _, err := stream.CloseAndRecv(); err != nil {
		return err
	}
	_, err = e.c().Catalog.SetCheckpoints(ctx, &api.SetCheckpointsRequest{
		Collection: byName(name), Checkpoints: []*api.ChannelPosition{{Position: &api.Position{Timestamp: 10}}},
	})
	return err
}

// take takes a snapshot of a collection.
func (e *env) take(ctx context.Context, collection, name, token string) error {
	what := "snapshot " + name + " " + token
	got, err := e.c().Snapshots.CreateSnapshot(
		ctx,
		&api.CreateSnapshotRequest{Collection: byName(collection), Name: name, RequestToken: token},
	)
	if err != nil {
		return err
	}
	if err := e.claimID(got.GetSnapshot().GetId(), what); err != nil {
		return err
	}
	return e.same(what, got.GetSnapshot().GetId())
}

// dropSegments drops segments of a collection.
func (e *env) dropSegments(ctx context.Context, collection string, ids ...int64) error {
	_, err := e.c().Catalog.DropSegments(ctx, &api.DropSegmentsRequest{Collection: byName(collection), SegmentIds: ids})
	return err
}

// without returns segments without those of ids.
func without(segments []seg, ids ...int64) []seg {
	return slices.DeleteFunc(slices.Clone(segments), func(s seg) bool { return slices.Contains(ids, s.ID) })
}

// copies returns the result of a restore of segments, of all partitions by default.
func copies(segments []seg, partitions ...string) []seg {
	var list []seg
	for _, s := range segments {
		if len(partitions) == 0 || slices.Contains(partitions, s.Partition) {
			list = append(list, seg{Partition: s.Partition, Files: s.Files})
		}
	}
	return list
}

// restore restores a snapshot and returns the job's id.
func (e *env) restore(ctx context.Context, req *api.RestoreSnapshotRequest) (int64, error) {
	got, err := e.c().Snapshots.RestoreSnapshot(ctx, req)
	if err != nil {
		return 0, err
	}
	name := req.GetTarget().GetName()
	if err := e.claimID(got.GetJobId(), "restore to "+name+" "+req.GetRequestToken()); err != nil {
		return 0, err
	}
	if err := e.claimID(got.GetCollectionId(), "collection "+name+" "+req.GetRequestToken()); err != nil {
		return 0, err
	}
	if err := e.same("target of "+name, got.GetCollectionId()); err != nil {
		return 0, err
	}
	return got.GetJobId(), e.same("restore to "+name, got.GetJobId())
}

// ended waits until a restore ends and checks its state.
func (e *env) ended(ctx context.Context, job int64, want api.RestoreJob_State) error {
	got, err := client.WaitRestore(ctx, e.c().Snapshots, job)
	if err != nil {
		return err
	}
	if got.GetState() != want {
		return fmt.Errorf("restore %d is %v, not %v: %s %s", job, got.GetState(), want, got.GetReason(), got.GetMessage())
	}
	return nil
}

// collect runs a collector cycle and waits until its files are deleted.
func (e *env) collect(ctx context.Context) error {
	stream, err := e.c().Collector.Collect(ctx, &api.CollectRequest{Wait: true})
	for err == nil {
		_, err = stream.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// build makes the base of every case.
func (e *env) build(ctx context.Context) error {
	if err := e.collection(ctx, shop, taskSize+3, taskSize); err != nil {
		return fmt.Errorf("collection %s: %w", shop, err)
	}
	if err := e.collection(ctx, mall, 4, 1); err != nil {
		return fmt.Errorf("collection %s: %w", mall, err)
	}
	if err := e.take(ctx, shop, old, client.NewRequestToken()); err != nil {
		return err
	}
	e.Snapshots[old] = e.Collections[shop]
	e.Old = e.Collections[shop][1].ID
	if err := e.dropSegments(ctx, shop, e.Old); err != nil {
		return err
	}
	e.Collections[shop] = without(e.Collections[shop], e.Old)
	if err := e.take(ctx, shop, keep, client.NewRequestToken()); err != nil {
		return err
	}
	e.Snapshots[keep] = e.Collections[shop]
	// A restored collection that has lost a segment.
	job, err := e.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot:     snapshot(keep),
		Target:       &api.CollectionName{Name: "before"},
		Partitions:   []string{"small"},
		RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return err
	}
	if err := e.ended(ctx, job, api.RestoreJob_STATE_COMPLETED); err != nil {
		return err
	}
	e.Restored["before"] = true
	segments, err := e.export(ctx, "before")
	if err != nil {
		return err
	}
	e.Late = segments[0].GetFiles()[0].GetPath()
	if err := e.dropSegments(ctx, "before", segments[0].GetId()); err != nil {
		return err
	}
	e.Collections["before"] = copies(e.Snapshots[keep], "small")[1:]
	if e.Spare, err = e.allocate(ctx, spareIDs, client.NewRequestToken(), "spare"); err != nil {
		return err
	}
	if e.Dead, err = e.allocate(ctx, deadIDs, client.NewRequestToken(), "dead"); err != nil {
		return err
	}
	return e.spilled(ctx, 1)
}

// spilled waits until exactly want units are held, all with spilled records.
func (e *env) spilled(ctx context.Context, want int64) error {
	return eventually(ctx, func(ctx context.Context) error {
		got, err := e.c().Collector.GetCollectorStatus(ctx, &api.GetCollectorStatusRequest{})
		if err != nil {
			return err
		}
		if r := got.GetLastRound(); r.GetHeld() != want || r.GetParked() != want {
			return fmt.Errorf("%d units are held and %d spilled, not %d", r.GetHeld(), r.GetParked(), want)
		}
		return nil
	})
}

// awaitHeartbeat starts snapshotd, waits for a new epoch object, and ends snapshotd.
func (e *env) awaitHeartbeat(ctx context.Context) error {
	notes := func() (string, error) {
		list, err := filepath.Glob(e.objects("gc", "epoch", "*.json"))
		return slices.Max(append(list, "")), err
	}
	had, err := notes()
	if err != nil {
		return err
	}
	if err := e.start(ctx, start{}); err != nil {
		return err
	}
	err = eventually(ctx, func(context.Context) error {
		have, err := notes()
		if err == nil && have == had {
			err = errors.New("there is no new epoch object")
		}
		return err
	})
	return errors.Join(err, e.s.stop())
}

// export returns a collection's segments in the order of their ids.
func (e *env) export(ctx context.Context, name string) ([]*api.Segment, error) {
	stream, err := e.c().Catalog.ExportSegments(ctx, &api.ExportSegmentsRequest{Collection: byName(name)})
	var all []*api.Segment
	for err == nil {
		var part *api.ExportSegmentsResponse
		if part, err = stream.Recv(); err == nil {
			all = append(all, part.GetSegments()...)
		}
	}
	if !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("export %s: %w", name, err)
	}
	slices.SortFunc(all, func(a, b *api.Segment) int { return int(a.GetId() - b.GetId()) })
	return all, nil
}
