//go:build robustness && linux

package robustness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

const (
	workers      = 5
	names        = 4 // that snapshots have
	callTimeout  = 3 * time.Second
	callAttempts = 4
	idsEach      = 20_000
	neverID      = int64(1) << 50 // never allocated
)

// outcome is the outcome of a call.
type outcome int

const (
	success  outcome = iota
	refused          // a definite error: it had no effect, and will have none
	noAnswer         // it may have had its effect, or may yet
)

// traffic is the clients at work.
type traffic struct {
	*env
	l          *ledger
	seed       uint64
	collection collection // of the clients' own
	own        *worker    // the scenario's, if it has one, of a collection of its own
	ownFirst   *snapshot  // of that collection
	round      int        // of the harm
	storeFails bool       // see scenario
	wrongHeads bool       // likewise
	overtakes  bool       // likewise

	swept atomic.Int64 // objects that sweeps have deleted

	mu       sync.Mutex
	counts   [3]int           // calls, by outcome
	errors   map[string]int   // by code and reason
	improper []string         // answers that no fault explains
	known    []*snapshot      // of the clients' collection that were acknowledged
	jobs     map[int64]string // restores that were admitted, by id: names of their targets

	collections []collection // all that clients write to
}

// collection is one that clients write to.
type collection struct{ id, partition int64 }

// worker is one client. It does one thing after the other.
type worker struct {
	*traffic
	collection

	id      int
	rand    *rand.Rand
	next    int64 // id for a segment
	n       int   // what it has made, for names and tags
	alive   []int64
	gone    []int64 // removed by a call that was acknowledged
	dropped int64   // the snapshot that it dropped last
}

func (c collection) ref() *snapshotdv1.CollectionRef {
	return &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: c.id}}
}

func byID(id int64) *snapshotdv1.SnapshotRef {
	return &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Id{Id: id}}
}

func byName(name string) *snapshotdv1.SnapshotRef {
	return &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Name{Name: name}}
}

// call makes a call at a random replica, and repeats it while there is no answer: all
// attempts must write the same. The moments are before the first attempt and after the
// last. It continues when the traffic ends. A definite error after an attempt without an
// answer does not decide that attempt.
func (w *worker) call(
	ctx context.Context,
	fn func(context.Context, *client.Client) error,
) (end outcome, from, to moment, err error) {
	from = w.now()
	for attempt := range callAttempts {
		if attempt > 0 {
			_ = wait(ctx, time.Duration(50+w.rand.IntN(300))*time.Millisecond)
		}
		each, cancel := context.WithTimeout(ctx, callTimeout)
		err = fn(each, w.replicas[w.rand.IntN(replicas)].client)
		cancel()
		var now outcome
		if now = w.judge(err); now != noAnswer {
			if now == refused && attempt > 0 {
				now = noAnswer
			}
			end = now
			break
		}
		end = noAnswer
	}
	to = w.now()
	w.mu.Lock()
	w.counts[end]++
	w.mu.Unlock()
	return end, from, to, err
}

// alarms are reasons that no fault of a scenario explains.
var alarms = []string{
	"METADATA_BEHIND",
	"OBJECT_STORE_DENIED",
	"OBJECT_STORE_MISCONFIGURED",
	"FORMAT_TOO_NEW",
	"NEVER_EXISTED",
	fileMissing,
}

// fileMissing is the reason of a refused create with a missing or changed file.
const fileMissing = "FILE_MISSING"

// judge returns the outcome that an error means, and records improper errors.
func (w *worker) judge(err error) outcome {
	if err == nil {
		return success
	}
	code, reason := status.Code(err), client.Reason(err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.errors[code.String()+" "+reason]++
	switch code {
	case codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.Aborted:
		if slices.Contains(alarms, reason) && (reason != fileMissing || !w.wrongHeads) ||
			reason == "REFERENCES_UNREADABLE" && !w.storeFails {
			w.improper = append(w.improper, err.Error())
		}
		return refused
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted:
		return noAnswer
	default:
		w.improper = append(w.improper, err.Error())
		return noAnswer
	}
}

// prepare makes the clients' collection, and puts foreign objects where deletes reach.
func (t *traffic) prepare(ctx context.Context) (err error) {
	if t.collection, err = t.newCollection(ctx, "source"); err != nil {
		return err
	}
	c, p := t.collection.id, t.collection.partition
	for i, key := range []string{
		"note", snapshotPrefix + "note", fmt.Sprintf("%s%d/note", snapshotPrefix, c), fmt.Sprintf("%s%d/%d/note",
			snapshotPrefix, c, c),
		fmt.Sprintf("%s%d/%d/metadata.json", snapshotPrefix, c, neverID), "gc/note", heldPrefix + "note",
		fmt.Sprintf("%s%d/%d", heldPrefix, c, neverID),
		epochPrefix + "note", dataPrefix + "note", fmt.Sprintf("%s%d/note", dataPrefix, c), fmt.Sprintf("%s%d/%d/note",
			dataPrefix, c, p),
		fmt.Sprintf("%s%d/%d/%d/insert/100/1", dataPrefix, c, p, neverID), fmt.Sprintf("%s%d/note", dataPrefix, neverID),
	} {
		body := fmt.Appendf(nil, "note %d", i)
		if _, err := t.store.PutObject(
			ctx,
			&awss3.PutObjectInput{Bucket: &t.bucket, Key: &key, Body: bytes.NewReader(body)},
		); err != nil {
			return err
		}
		t.l.foreign[key] = stored{sum: sha256.Sum256(body), size: int64(len(body))}
	}
	return nil
}

// newCollection makes a collection with one partition.
func (t *traffic) newCollection(ctx context.Context, name string) (collection, error) {
	var made collection
	c := t.replicas[0].client
	col, err := c.Catalog.CreateCollection(ctx, &snapshotdv1.CreateCollectionRequest{
		Name: &snapshotdv1.CollectionName{
			Name: name,
		},
		Roots:        []*snapshotdv1.Root{{Prefix: dataPrefix}},
		RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return made, err
	}
	made.id = col.GetCollection().GetId()
	p, err := c.Catalog.CreatePartition(
		ctx,
		&snapshotdv1.CreatePartitionRequest{Collection: made.ref(), Name: "p", RequestToken: client.NewRequestToken()},
	)
	made.partition = p.GetPartition().GetId()
	t.collections = append(t.collections, made)
	return made, err
}

// newWorker returns a client of a collection, with ids of its own.
func (t *traffic) newWorker(ctx context.Context, id int, of collection) (*worker, error) {
	ids, err := t.replicas[0].client.Catalog.AllocateIds(ctx, &snapshotdv1.AllocateIdsRequest{
		Want: &snapshotdv1.AllocateIdsRequest_Count{Count: idsEach}, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return nil, err
	}
	return &worker{
		traffic:    t,
		collection: of,
		id:         id,
		rand:       rand.New(rand.NewPCG(t.seed, uint64(id))),
		next:       ids.GetIds().GetFirst(),
	}, nil
}

// work makes one call after the other until stopped. It completes calls under way.
func (w *worker) work(ctx context.Context, stop <-chan struct{}) error {
	deeds := []struct {
		weight int
		do     func(context.Context) error
	}{
		{20, w.add},
		{12, w.compact},
		{6, w.remove},
		{14, w.create},
		{9, w.drop},
		{10, w.get},
		{5, w.list},
		{3, w.pinAWhile},
		{5, w.restore},
		{2, w.cancel},
		{5, w.reclaim},
		{2, w.collect},
		{2, w.sweep},
	}
	sum := 0
	for _, d := range deeds {
		sum += d.weight
	}
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		n := w.rand.IntN(sum)
		for _, d := range deeds {
			if n -= d.weight; n < 0 {
				if err := d.do(ctx); err != nil {
					return fmt.Errorf("client %d: %w", w.id, err)
				}
				break
			}
		}
		_ = wait(ctx, time.Duration(w.rand.IntN(30))*time.Millisecond)
	}
}

// write makes a segment with real objects, without snapshotd, and records it.
func (w *worker) write(ctx context.Context) (*snapshotdv1.Segment, error) {
	bodies := make([][]byte, 1+w.rand.IntN(3))
	for n := range bodies {
		bodies[n] = w.bytes(1 + w.rand.IntN(4096))
	}
	return w.writeAs(ctx, bodies)
}

// bytes returns n random bytes.
func (w *worker) bytes(n int) []byte {
	body := make([]byte, n)
	for i := range body {
		body[i] = byte(w.rand.UintN(256))
	}
	return body
}

// writeAs is write of these files.
func (w *worker) writeAs(ctx context.Context, bodies [][]byte) (*snapshotdv1.Segment, error) {
	id := w.next
	w.next++
	s := &snapshotdv1.Segment{Id: id, PartitionId: w.partition, Rows: 10, StorageVersion: 2}
	noted := &segment{collection: w.collection.id, call: forever, ret: forever, removal: forever, removed: forever}
	files := map[string]file{}
	for n, body := range bodies {
		path := fmt.Sprintf("%d/%d/%d/insert/100/%d", w.collection.id, w.partition, id, n+1)
		key := dataPrefix + path
		each, cancel := context.WithTimeout(ctx, patience)
		put, err := w.store.PutObject(each, &awss3.PutObjectInput{Bucket: &w.bucket, Key: &key, Body: bytes.NewReader(body)})
		cancel()
		if err != nil {
			return nil, err
		}
		s.Files = append(s.Files, &snapshotdv1.File{
			Path:      path,
			Kind:      "insert",
			FieldId:   100,
			LogId:     int64(n + 1),
			SizeBytes: int64(len(body)),
			Etag:      trim(put.ETag),
			Entries:   10,
		})
		files[key] = file{sum: sha256.Sum256(body), size: int64(len(body)), segment: id}
		noted.keys = append(noted.keys, key)
	}
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	w.l.segments[id] = noted
	maps.Copy(w.l.files, files)
	return s, nil
}

func trim(etag *string) string {
	if etag == nil {
		return ""
	}
	return string(bytes.Trim([]byte(*etag), `"`))
}

func (w *worker) add(ctx context.Context) error {
	s, err := w.write(ctx)
	if err != nil {
		return err
	}
	w.register(ctx, s)
	return nil
}

// register registers a written segment.
func (w *worker) register(ctx context.Context, s *snapshotdv1.Segment) outcome {
	w.l.note(func(l *ledger) { l.segments[s.GetId()].call = w.now() })
	end, from, to, _ := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		stream, err := c.Catalog.AddSegments(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(
			&snapshotdv1.AddSegmentsRequest{Collection: w.ref(), Segments: []*snapshotdv1.Segment{s}},
		); err != nil &&
			!errors.Is(err, io.EOF) {
			return err
		}
		_, err = stream.CloseAndRecv()
		return err
	})
	w.l.note(func(l *ledger) {
		g := l.segments[s.GetId()]
		g.call = from
		switch end {
		case success:
			g.ret = to
			w.alive = append(w.alive, s.GetId())
		case refused:
			g.call, g.removal = forever, 0 // it never is
		case noAnswer: // no client touches it again
		}
	})
	return end
}

// take removes a segment from the worker's own list.
func (w *worker) take() int64 {
	i := w.rand.IntN(len(w.alive))
	id := w.alive[i]
	w.alive = slices.Delete(w.alive, i, i+1)
	return id
}

func (w *worker) compact(ctx context.Context) error {
	if len(w.alive) < 2 {
		return w.add(ctx)
	}
	inputs := []int64{w.take(), w.take()}
	out, err := w.write(ctx)
	if err != nil {
		return err
	}
	req := &snapshotdv1.CompactSegmentsRequest{
		Collection:   w.ref(),
		Inputs:       inputs,
		Outputs:      []*snapshotdv1.Segment{out},
		RequestToken: client.NewRequestToken(),
	}
	end, from, to, err := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.Catalog.CompactSegments(ctx, req)
		return err
	})
	w.l.note(func(l *ledger) {
		g := l.segments[out.GetId()]
		switch end {
		case success:
			g.call, g.ret = from, to
			w.alive = append(w.alive, out.GetId())
			for _, id := range inputs {
				l.segments[id].removal, l.segments[id].removed = from, to
				w.gone = append(w.gone, id)
			}
			l.compactions = append(l.compactions, compaction{inputs: inputs, output: out.GetId(), call: from, ret: to})
		case refused:
			g.removal = 0
			w.alive = append(w.alive, inputs...)
			if client.Reason(err) != "CONFLICT" {
				w.improper = append(w.improper, fmt.Sprintf("compaction of %v: %v", inputs, err))
			}
		case noAnswer:
			g.call = from
			for _, id := range inputs {
				l.segments[id].removal = from
			}
		}
	})
	return nil
}

func (w *worker) remove(ctx context.Context) error {
	if len(w.alive) < 3 {
		return w.add(ctx)
	}
	w.dropSegment(ctx, w.take())
	return nil
}

// dropSegment drops a segment of the worker.
func (w *worker) dropSegment(ctx context.Context, id int64) {
	end, from, to, _ := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.Catalog.DropSegments(ctx, &snapshotdv1.DropSegmentsRequest{Collection: w.ref(), SegmentIds: []int64{id}})
		return err
	})
	w.l.note(func(l *ledger) {
		g := l.segments[id]
		switch end {
		case success:
			g.removal, g.removed = from, to
			w.gone = append(w.gone, id)
		case refused:
			w.alive = append(w.alive, id)
		case noAnswer:
			g.removal = from
		}
	})
}

// name returns a random name of the few.
func (w *worker) name() string { return fmt.Sprintf("s%d", w.rand.IntN(names)) }

// tag returns a new tag.
func (w *worker) tag() string {
	w.n++
	return fmt.Sprintf("c%d.%d", w.id, w.n)
}

func (w *worker) create(ctx context.Context) error {
	w.createNamed(ctx, w.name())
	return nil
}

// createNamed takes a snapshot, and returns it when acknowledged, else nil. Every second
// create verifies its files, except where they may be harmed.
func (w *worker) createNamed(ctx context.Context, name string) *snapshot {
	tag := w.tag()
	req := &snapshotdv1.CreateSnapshotRequest{
		Collection:   w.ref(),
		Name:         name,
		Description:  tag,
		RequestToken: client.NewRequestToken(),
		Verify:       w.n%2 == 0 && w != w.own,
	}
	s := &snapshot{collection: w.collection.id, tag: tag, name: name, call: w.now(), ret: forever}
	w.l.note(func(l *ledger) { l.snapshots[tag] = s })
	var made *snapshotdv1.Snapshot
	end, from, to, err := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		resp, err := c.Snapshots.CreateSnapshot(ctx, req)
		made = resp.GetSnapshot()
		return err
	})
	ev := func(k kind, maybe bool) event {
		e := event{Client: w.id, Name: name, Kind: k, Tag: tag, Call: from, Return: to, Maybe: maybe}
		if end == noAnswer {
			e.Return = forever
		}
		return e
	}
	w.l.note(func(l *ledger) {
		s.call = from
		switch {
		case end == success:
			l.events = append(l.events, ev(begun, false), ev(committed, false))
			s.ret, s.id, s.committed = to, made.GetId(), true
			if made.GetDescription() != tag || made.GetName() != name {
				w.wrong("create of %s, %s, was answered with %v", name, tag, made)
			}
		case end == refused && status.Code(err) == codes.AlreadyExists:
			l.events = append(l.events, event{Client: w.id, Name: name, Kind: seenTaken, Call: from, Return: to})
		case end == refused:
			l.events = append(l.events, ev(begun, true), ev(givenUp, false))
		default:
			l.events = append(l.events, ev(begun, true), ev(ended, false))
		}
	})
	if end != success {
		return nil
	}
	if w.collection == w.traffic.collection { // others are private
		w.mu.Lock()
		w.known = append(w.known, s)
		w.mu.Unlock()
	}
	content, end, _ := w.content(ctx, s.id)
	if end == success {
		w.l.note(func(*ledger) { s.content = content })
	}
	return s
}

// wrong records an improper answer.
func (t *traffic) wrong(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.improper = append(t.improper, fmt.Sprintf(format, args...))
}

// content reads the keys of the files of a snapshot, by segment.
func (w *worker) content(ctx context.Context, id int64) (map[int64][]string, outcome, error) {
	content := map[int64][]string{}
	token := ""
	for {
		var resp *snapshotdv1.ListSnapshotSegmentsResponse
		end, _, _, err := w.call(ctx, func(ctx context.Context, c *client.Client) (err error) {
			resp, err = c.Snapshots.ListSnapshotSegments(ctx, &snapshotdv1.ListSnapshotSegmentsRequest{
				Snapshot: byID(id), View: snapshotdv1.SegmentView_SEGMENT_VIEW_FILES, PageSize: 1000, PageToken: token,
			})
			return err
		})
		if end != success {
			return nil, end, err
		}
		for _, s := range resp.GetSegments() {
			content[s.GetSegment().GetId()] = keysOf(s.GetSegment())
		}
		if token = resp.GetNextPageToken(); token == "" {
			return content, success, nil
		}
	}
}

func keysOf(s *snapshotdv1.Segment) []string {
	keys := make([]string, len(s.GetFiles()))
	for i, f := range s.GetFiles() {
		keys[i] = dataPrefix + f.GetPath()
	}
	return keys
}

// seen records the result of a read of a name. Without fresh it is not in the history: a
// list follows a watch, and where progress overtakes events it may be stale.
func (w *worker) seen(name string, s *snapshotdv1.Snapshot, from, to moment, fresh bool) {
	e := event{Client: w.id, Name: name, Tag: s.GetDescription(), Call: from, Return: to}
	switch s.GetState() {
	case snapshotdv1.Snapshot_STATE_COMMITTED:
		e.Kind = seenSnapshot
	case snapshotdv1.Snapshot_STATE_PENDING:
		e.Kind = seenPending
	default:
		return // it was dropped while it was read
	}
	w.l.note(func(l *ledger) {
		if fresh {
			l.events = append(l.events, e)
		}
		mine := l.snapshots[e.Tag]
		if mine == nil {
			w.wrong("snapshot %v is unknown", s)
			return
		}
		if mine.id == 0 {
			mine.id = s.GetId()
		}
		mine.committed = mine.committed || e.Kind == seenSnapshot
		if mine.id != s.GetId() || mine.name != s.GetName() {
			w.wrong("snapshot %v was %d, %s", s, mine.id, mine.name)
		}
	})
}

func (w *worker) get(ctx context.Context) error { return w.getNamed(ctx, w.name()) }

func (w *worker) getNamed(ctx context.Context, name string) error {
	var got *snapshotdv1.Snapshot
	end, from, to, err := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		resp, err := c.Snapshots.GetSnapshot(ctx, &snapshotdv1.GetSnapshotRequest{Snapshot: byName(name)})
		got = resp.GetSnapshot()
		return err
	})
	switch {
	case end == success:
		w.seen(name, got, from, to, true)
	case status.Code(err) == codes.NotFound: // of a read, whatever came before
		w.l.note(func(l *ledger) {
			l.events = append(l.events, event{Client: w.id, Name: name, Kind: seenFree, Call: from, Return: to})
		})
	}
	return nil
}

func (w *worker) list(ctx context.Context) error {
	var got []*snapshotdv1.Snapshot
	end, from, to, _ := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		resp, err := c.Snapshots.ListSnapshots(ctx, &snapshotdv1.ListSnapshotsRequest{PageSize: 1000})
		got = resp.GetSnapshots()
		return err
	})
	if end != success {
		return nil
	}
	for n := range names {
		name := fmt.Sprintf("s%d", n)
		i := slices.IndexFunc(got, func(s *snapshotdv1.Snapshot) bool { return s.GetName() == name })
		if i >= 0 {
			w.seen(name, got[i], from, to, !w.overtakes)
			continue
		}
		if w.overtakes {
			continue
		}
		w.l.note(func(l *ledger) {
			l.events = append(l.events, event{Client: w.id, Name: name, Kind: seenNone, Call: from, Return: to})
		})
	}
	return nil
}

func (w *worker) drop(ctx context.Context) error {
	name := w.name()
	req := &snapshotdv1.DropSnapshotRequest{Snapshot: byName(name), RequestToken: client.NewRequestToken()}
	var id int64
	end, from, to, err := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		resp, err := c.Snapshots.DropSnapshot(ctx, req)
		id = resp.GetSnapshotId()
		return err
	})
	e := event{Client: w.id, Name: name, Call: from, Return: to}
	w.l.note(func(l *ledger) {
		switch {
		case end == success && id == 0:
			e.Kind = seenFree
		case end == success:
			e.Kind, e.Tag = dropped, idTag(id)
			l.drops = append(l.drops, drop{name: name, id: id, call: from, ret: to})
		case end == refused && client.Reason(err) == "SNAPSHOT_PENDING":
			e.Kind = seenPending
		case end == refused && client.Reason(err) == "SNAPSHOT_PINNED":
			e.Kind = seenSnapshot
		case end == refused:
			return
		default:
			e.Kind, e.Maybe, e.Return = dropped, true, forever
			l.drops = append(l.drops, drop{name: name, call: from, ret: forever})
		}
		l.events = append(l.events, e)
	})
	if end != success || id == 0 {
		return nil
	}
	before := w.dropped
	w.dropped = id
	if before == 0 {
		return nil
	}
	return w.late(ctx, before)
}

// late writes an object of a dropped snapshot, as a process may that was thought dead. A
// sweep must find it.
func (w *worker) late(ctx context.Context, id int64) error {
	key := fmt.Sprintf("%s%d/%d/refs.avro", snapshotPrefix, w.collection.id, id)
	each, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := w.store.PutObject(each, &awss3.PutObjectInput{Bucket: &w.bucket, Key: &key, Body: strings.NewReader("late")})
	return err
}

// some returns one of the snapshots that were acknowledged last, or nil.
func (w *worker) some() *snapshot {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.known) == 0 {
		return nil
	}
	return w.known[len(w.known)-1-w.rand.IntN(min(len(w.known), names))]
}

func (w *worker) pinAWhile(ctx context.Context) error {
	s := w.some()
	if s == nil {
		return w.create(ctx)
	}
	req := &snapshotdv1.PinSnapshotRequest{
		Snapshot: byID(s.id), Owner: "robustness", Ttl: durationpb.New(time.Hour), RequestToken: client.NewRequestToken(),
	}
	var made int64
	end, _, to, _ := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		resp, err := c.Snapshots.PinSnapshot(ctx, req)
		made = resp.GetPin().GetId()
		return err
	})
	if end != success {
		return nil
	}
	_ = wait(ctx, time.Duration(w.rand.IntN(300))*time.Millisecond)
	w.l.note(func(l *ledger) { l.pins = append(l.pins, pin{id: s.id, from: to, to: w.now()}) })
	_, _, _, _ = w.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.Snapshots.UnpinSnapshot(ctx, &snapshotdv1.UnpinSnapshotRequest{Snapshot: byID(s.id), PinId: made})
		return err
	})
	return nil
}

func (w *worker) restore(ctx context.Context) error {
	s := w.some()
	if s == nil {
		return w.create(ctx)
	}
	w.n++
	name := fmt.Sprintf("t%d_%d", w.id, w.n)
	w.restoreAs(ctx, s.id, name)
	return nil
}

// restoreAs requests a restore and returns its job, 0 when none is known to be admitted.
func (w *worker) restoreAs(ctx context.Context, id int64, name string) int64 {
	r := &restore{name: name, snapshot: id}
	req := &snapshotdv1.RestoreSnapshotRequest{
		Snapshot: byID(id), Target: &snapshotdv1.CollectionName{Name: name}, RequestToken: client.NewRequestToken(),
	}
	w.l.note(func(l *ledger) { l.restores = append(l.restores, r) })
	end, _, _, _ := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		resp, err := c.Snapshots.RestoreSnapshot(ctx, req)
		if err == nil {
			w.l.note(func(*ledger) { r.job, r.target = resp.GetJobId(), resp.GetCollectionId() })
		}
		return err
	})
	if end == success {
		if w != w.own { // whose restores are not canceled
			w.mu.Lock()
			w.jobs[r.job] = name
			w.mu.Unlock()
		}
		return r.job
	}
	if end == refused {
		w.l.note(func(l *ledger) { l.restores = slices.DeleteFunc(l.restores, func(o *restore) bool { return o == r }) })
	}
	return 0
}

func (w *worker) cancel(ctx context.Context) error {
	w.mu.Lock()
	ids := make([]int64, 0, len(w.jobs))
	for id := range w.jobs {
		ids = append(ids, id)
	}
	w.mu.Unlock()
	if len(ids) == 0 {
		return w.restore(ctx)
	}
	id := slices.Max(ids)
	_, _, _, _ = w.call(ctx, func(ctx context.Context, c *client.Client) error {
		_, err := c.Snapshots.CancelRestore(ctx, &snapshotdv1.CancelRestoreRequest{JobId: id})
		return err
	})
	return nil
}

func (w *worker) reclaim(ctx context.Context) error {
	if len(w.gone) == 0 {
		return w.compact(ctx)
	}
	var units []*snapshotdv1.Unit
	for range 1 + w.rand.IntN(5) {
		units = append(
			units,
			&snapshotdv1.Unit{Unit: &snapshotdv1.Unit_SegmentId{SegmentId: w.gone[w.rand.IntN(len(w.gone))]}},
		)
	}
	// Of one that lives as well: it must not be granted.
	live := int64(0)
	if len(w.alive) > 0 {
		live = w.alive[w.rand.IntN(len(w.alive))]
		units = append(units, &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_SegmentId{SegmentId: live}})
	}
	_, _, _, _ = w.call(ctx, func(ctx context.Context, c *client.Client) error {
		resp, err := c.Reclaim.Reclaim(
			ctx,
			&snapshotdv1.ReclaimRequest{Collection: w.ref(), Units: units, Deleter: snapshotdv1.Deleter_DELETER_SNAPSHOTD},
		)
		if err == nil && live != 0 &&
			resp.GetResults()[len(units)-1].GetOutcome() == snapshotdv1.ReclaimResult_OUTCOME_GRANTED {
			w.wrong("segment %d lives, and was granted", live)
		}
		return err
	})
	return nil
}

func (w *worker) collect(ctx context.Context) error {
	_, _, _, _ = w.call(ctx, func(ctx context.Context, c *client.Client) error {
		return w.roundOf(ctx, c, &snapshotdv1.CollectRequest{Collection: w.ref(), Force: true})
	})
	return nil
}

func (w *worker) sweep(ctx context.Context) error {
	_, _, _, _ = w.call(ctx, func(ctx context.Context, c *client.Client) error {
		return w.roundOf(ctx, c, &snapshotdv1.CollectRequest{Sweep: true})
	})
	return nil
}

// roundOf runs a collector cycle and counts what it swept.
func (w *worker) roundOf(ctx context.Context, c *client.Client, req *snapshotdv1.CollectRequest) error {
	stream, err := c.Collector.Collect(ctx, req)
	for err == nil {
		var m *snapshotdv1.CollectResponse
		if m, err = stream.Recv(); err == nil {
			w.swept.Add(m.GetSummary().GetSwept())
			if text := m.GetSummary().GetError(); text != "" {
				err = status.Error(codes.Unavailable, text)
			}
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
