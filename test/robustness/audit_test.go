//go:build robustness && linux

package robustness

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

const judgePatience = 20 * time.Second // for the history of one name

// settle waits, without faults, until all work has ended, and checks the cluster: a
// create, a restore and a collector cycle must succeed.
func (w *worker) settle(ctx context.Context) error {
	if w.leads(ctx) == nil {
		return errors.New("no replica leads after the end of the faults")
	}
	var id int64
	if err := w.until(ctx, "a snapshot is created", func(ctx context.Context, c *client.Client) (bool, error) {
		tag := w.tag()
		s := &snapshot{collection: w.collection.id, tag: tag, name: "final", call: w.now(), ret: forever}
		w.l.note(func(l *ledger) { l.snapshots[tag] = s })
		resp, err := c.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
			Collection: w.ref(), Name: "final-" + tag, Description: tag, RequestToken: client.NewRequestToken(),
		})
		if err == nil {
			id = resp.GetSnapshot().GetId()
			w.l.note(func(*ledger) { s.id, s.ret, s.committed, s.name = id, w.now(), true, "final-"+tag })
		}
		return err == nil, err
	}); err != nil {
		return err
	}
	if err := w.until(ctx, "a restore is admitted", func(ctx context.Context, _ *client.Client) (bool, error) {
		w.n++
		job := w.restoreAs(ctx, id, fmt.Sprintf("final_%d", w.n))
		return job != 0, nil
	}); err != nil {
		return err
	}
	if err := w.until(ctx, "all restores end", func(ctx context.Context, c *client.Client) (bool, error) {
		resp, err := c.Snapshots.ListRestoreJobs(
			ctx,
			&snapshotdv1.ListRestoreJobsRequest{PageSize: 1000, States: []snapshotdv1.RestoreJob_State{
				snapshotdv1.RestoreJob_STATE_PENDING, snapshotdv1.RestoreJob_STATE_EXECUTING,
			}},
		)
		if err == nil && len(resp.GetJobs()) > 0 {
			err = fmt.Errorf("%d jobs are under way, such as %v", len(resp.GetJobs()), resp.GetJobs()[0])
		}
		return err == nil, err
	}); err != nil {
		return err
	}
	if err := w.until(ctx, "a round of the collector succeeds", func(ctx context.Context, c *client.Client) (bool, error) {
		err := w.roundOf(ctx, c, &snapshotdv1.CollectRequest{Collection: w.ref(), Force: true, Wait: true})
		return err == nil, err
	}); err != nil {
		return err
	}
	return w.until(
		ctx,
		"a sweep leaves nothing of snapshots that are gone",
		func(ctx context.Context, c *client.Client) (bool, error) {
			if err := w.roundOf(ctx, c, &snapshotdv1.CollectRequest{Sweep: true}); err != nil {
				return false, err
			}
			left, err := w.left(ctx, c)
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("%d objects are left, such as %s", len(left), left[0])
			}
			return err == nil, err
		},
	)
}

// left returns the objects of snapshots that do not exist.
func (w *worker) left(ctx context.Context, c *client.Client) ([]string, error) {
	keys, err := w.keys(ctx, snapshotPrefix)
	if err != nil {
		return nil, err
	}
	resp, err := c.Snapshots.ListSnapshots(ctx, &snapshotdv1.ListSnapshotsRequest{PageSize: 1000})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(keys, func(key string) bool {
		_, foreign := w.l.foreign[key]
		id, ok := ownID(key)
		return foreign || !ok ||
			slices.ContainsFunc(resp.GetSnapshots(), func(s *snapshotdv1.Snapshot) bool { return s.GetId() == id })
	}), nil
}

// until calls one replica after the other until one succeeds. It returns the last error
// after its patience.
func (w *worker) until(
	ctx context.Context,
	what string,
	done func(context.Context, *client.Client) (bool, error),
) error {
	var last error
	n := 0
	if !w.await(ctx, func(ctx context.Context) bool {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		n++
		ok, err := done(ctx, w.replicas[n%replicas].client)
		if err != nil {
			last = err
		}
		return ok
	}) {
		return fmt.Errorf("not in %v without faults: %s: %w", patience, what, last)
	}
	return nil
}

// audit judges the final state. It returns the complaints and the number of objects that
// the sweep has yet to find.
func (w *worker) audit(ctx context.Context) (worst verdict, text []string, orphans int, err error) {
	say := func(format string, args ...any) { text = append(text, fmt.Sprintf(format, args...)) }
	for n := range names {
		if err := w.getNamed(ctx, fmt.Sprintf("s%d", n)); err != nil {
			return broken, nil, 0, err
		}
	}
	if err := w.list(ctx); err != nil {
		return broken, nil, 0, err
	}
	var list []*snapshotdv1.Snapshot
	if err := w.until(ctx, "list", func(ctx context.Context, c *client.Client) (bool, error) {
		resp, err := c.Snapshots.ListSnapshots(ctx, &snapshotdv1.ListSnapshotsRequest{PageSize: 1000})
		list = resp.GetSnapshots()
		return err == nil, err
	}); err != nil {
		return broken, nil, 0, err
	}
	there := map[int64]bool{}
	contents := map[int64]map[int64][]string{} // by snapshot
	for _, s := range list {
		there[s.GetId()] = true
		mine := w.l.snapshots[s.GetDescription()]
		if mine == nil {
			say("snapshot %v is unknown", s)
			continue
		}
		content, end, err := w.content(ctx, s.GetId())
		if end != success {
			say("snapshot %d (%s) cannot be read: %v", s.GetId(), s.GetName(), err)
			continue
		}
		if mine.content != nil && !maps.EqualFunc(mine.content, content, slices.Equal[[]string]) {
			say("snapshot %d (%s) has changed: it held %v, and holds %v", s.GetId(), s.GetName(), mine.content, content)
		}
		mine.id, mine.committed, mine.content = s.GetId(), true, content
	}
	for _, s := range w.l.snapshots {
		if s.id != 0 && s.content != nil {
			contents[s.id] = s.content
		}
	}
	var catalog []*snapshotdv1.Segment
	for _, c := range w.collections {
		list, err := w.export(ctx, c.id)
		if err != nil {
			return broken, nil, 0, err
		}
		catalog = append(catalog, list...)
	}
	living := map[int64]bool{}
	for _, s := range catalog {
		g := w.l.segments[s.GetId()]
		living[s.GetId()] = true
		switch {
		case g == nil:
			say("segment %d of the catalog is unknown", s.GetId())
		case g.removed != forever:
			say("segment %d lives; it was removed at %v", s.GetId(), g.removed)
		case !slices.Equal(keysOf(s), g.keys):
			say("segment %d has files %v, not %v", s.GetId(), keysOf(s), g.keys)
		}
	}
	for id, g := range w.l.segments {
		if g.ret != forever && g.removal == forever && !living[id] {
			say("segment %d, acknowledged at %v, is not in the catalog", id, g.ret)
		}
	}
	targets, wrong, err := w.restored(ctx)
	if err != nil {
		return broken, nil, 0, err
	}
	text = append(text, wrong...)
	bucket, err := w.walk(ctx)
	if err != nil {
		return broken, nil, 0, err
	}
	for r, segments := range targets {
		text = append(text, w.l.copied(r, segments, contents[r.snapshot], bucket)...)
	}
	handedOut := func(id int64) bool {
		var known bool
		err := w.until(ctx, "ask for a snapshot", func(ctx context.Context, c *client.Client) (bool, error) {
			_, err := c.Snapshots.GetSnapshot(ctx, &snapshotdv1.GetSnapshotRequest{Snapshot: byID(id)})
			known = err == nil || client.Reason(err) == "EXPIRED_OR_DROPPED"
			return known || client.Reason(err) == "NEVER_EXISTED", err
		})
		return err == nil && known
	}
	wrong, orphans = w.l.objects(bucket, there, living, handedOut)
	text = append(text, wrong...)
	text = append(text, w.l.captures()...)
	text = append(text, w.l.pinned()...)
	text = append(text, w.l.lost(there)...)
	w.env.mu.Lock()
	deletions := slices.Clone(w.deletions)
	w.env.mu.Unlock()
	text = append(text, w.l.misdeeds(deletions)...)
	text = append(text, w.improper...)
	uploads, err := w.store.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: &w.bucket})
	if err != nil {
		return broken, nil, 0, err
	}
	for _, u := range uploads.Uploads { // of restores that have ended
		say("an upload of %s is open", *u.Key)
	}
	for _, p := range w.replicas {
		if p.endedItself() {
			say("%s ended by itself: %s", p.name, p.tail())
		}
	}
	if len(text) > 0 {
		worst = broken
	}
	v, wrong := linearizable(w.l.history(), judgePatience)
	return max(worst, v), append(text, wrong...), orphans, nil
}

// export returns the segments of a collection.
func (w *worker) export(ctx context.Context, id int64) (list []*snapshotdv1.Segment, err error) {
	err = w.until(ctx, "export a collection", func(ctx context.Context, c *client.Client) (bool, error) {
		list = nil
		stream, err := c.Catalog.ExportSegments(ctx, &snapshotdv1.ExportSegmentsRequest{
			Collection: &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: id}},
		})
		for err == nil {
			var m *snapshotdv1.ExportSegmentsResponse
			m, err = stream.Recv()
			list = append(list, m.GetSegments()...)
		}
		return errors.Is(err, io.EOF), err
	})
	return list, err
}

// restored checks each requested restore: of a COMPLETED one it returns the segments of
// the target; any other may leave no collection.
func (w *worker) restored(ctx context.Context) (targets map[*restore][]*snapshotdv1.Segment, text []string, err error) {
	jobs := map[string]*snapshotdv1.RestoreJob{}
	token := ""
	for {
		var resp *snapshotdv1.ListRestoreJobsResponse
		if err := w.until(ctx, "list restores", func(ctx context.Context, c *client.Client) (ok bool, err error) {
			resp, err = c.Snapshots.ListRestoreJobs(ctx, &snapshotdv1.ListRestoreJobsRequest{PageSize: 1000, PageToken: token})
			return err == nil, err
		}); err != nil {
			return nil, nil, err
		}
		for _, j := range resp.GetJobs() {
			jobs[j.GetTarget().GetName()] = j
		}
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	targets = map[*restore][]*snapshotdv1.Segment{}
	for _, r := range w.l.restores {
		j := jobs[r.name]
		if j == nil {
			if r.job != 0 {
				text = append(text, fmt.Sprintf("restore %d, to %s, was admitted and is gone", r.job, r.name))
			}
			continue
		}
		r.job, r.target = j.GetId(), j.GetTarget().GetId()
		var found *snapshotdv1.Collection
		if err := w.until(ctx, "get a collection", func(ctx context.Context, c *client.Client) (bool, error) {
			resp, err := c.Catalog.GetCollection(ctx, &snapshotdv1.GetCollectionRequest{Collection: &snapshotdv1.CollectionRef{
				Ref: &snapshotdv1.CollectionRef_Name{Name: &snapshotdv1.CollectionName{Name: r.name}},
			}})
			found = resp.GetCollection()
			return err == nil || client.Reason(err) == "COLLECTION_NOT_FOUND", err
		}); err != nil {
			return nil, nil, err
		}
		active := found.GetState() == snapshotdv1.Collection_STATE_ACTIVE
		switch j.GetState() {
		case snapshotdv1.RestoreJob_STATE_COMPLETED:
			if !active || found.GetId() != r.target {
				text = append(text, fmt.Sprintf("restore %d is complete, and %s is %v", r.job, r.name, found))
				continue
			}
			r.completed = true
			if targets[r], err = w.export(ctx, r.target); err != nil {
				return nil, nil, err
			}
			r.keys = map[string]bool{}
			for _, s := range targets[r] {
				for _, key := range keysOf(s) {
					r.keys[key] = true
				}
			}
		default:
			if found != nil {
				text = append(text, fmt.Sprintf("restore %d is %v, and %s is %v", r.job, j.GetState(), r.name, found))
			}
			if j.GetState() == snapshotdv1.RestoreJob_STATE_FAILED && !w.explained(r, j) {
				text = append(
					text,
					fmt.Sprintf("restore %d failed, which no fault explains: %s: %s", r.job, j.GetReason(), j.GetMessage()),
				)
			}
		}
	}
	return targets, text, nil
}

// explained reports whether a restore may have failed: its files were harmed, or the S3
// server answered so.
func (w *worker) explained(r *restore, j *snapshotdv1.RestoreJob) bool {
	switch j.GetReason() {
	case sourceMissing, sourceAltered:
		return w.wrongHeads || w.l.harmedIn(r.snapshot)
	default:
		return false
	}
}

// Reasons of restores that failed.
const (
	sourceMissing = "SOURCE_OBJECT_MISSING"
	sourceAltered = "SOURCE_OBJECT_ALTERED"
)

// copied judges a target: as many segments as the snapshot has, in its order, each
// with the bytes of its source.
func (l *ledger) copied(
	r *restore,
	segments []*snapshotdv1.Segment,
	content map[int64][]string,
	bucket map[string]stored,
) (text []string) {
	if content == nil {
		return nil // the snapshot was dropped before it was read
	}
	sources := slices.Sorted(maps.Keys(content))
	slices.SortFunc(segments, func(a, b *snapshotdv1.Segment) int { return int(a.GetId() - b.GetId()) })
	if len(sources) != len(segments) {
		return []string{
			fmt.Sprintf("restore %d is complete, and %s has %d of %d segments", r.job, r.name, len(segments), len(sources)),
		}
	}
	for i, s := range segments {
		want, got := map[[sha256.Size]byte]int{}, map[[sha256.Size]byte]int{}
		for _, key := range content[sources[i]] {
			want[l.files[key].sum]++
		}
		for _, key := range keysOf(s) {
			if o, ok := bucket[key]; ok {
				got[o.sum]++
			}
		}
		if !maps.Equal(want, got) {
			text = append(
				text,
				fmt.Sprintf(
					"restore %d is complete, and segment %d of %s, of %d, has other bytes or lacks some",
					r.job,
					s.GetId(),
					r.name,
					sources[i],
				),
			)
		}
	}
	return text
}

// walk reads the whole bucket, past the proxy.
func (e *env) walk(ctx context.Context) (map[string]stored, error) {
	bucket := map[string]stored{}
	keys, err := e.keys(ctx, "")
	if err != nil {
		return nil, err
	}
	objects := make([]*stored, len(keys))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for i, key := range keys {
		group.Go(func() error {
			got, err := e.store.GetObject(ctx, &s3.GetObjectInput{Bucket: &e.bucket, Key: &key})
			if err != nil {
				if isMissing(err) {
					return nil // deleted since it was listed
				}
				return err
			}
			defer func() { _ = got.Body.Close() }()
			hash := sha256.New()
			n, err := io.Copy(hash, got.Body)
			objects[i] = &stored{sum: [sha256.Size]byte(hash.Sum(nil)), size: n}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	for i, key := range keys {
		if objects[i] != nil {
			bucket[key] = *objects[i]
		}
	}
	return bucket, nil
}

// keys lists the bucket, past the proxy.
func (e *env) keys(ctx context.Context, prefix string) (keys []string, err error) {
	pages := s3.NewListObjectsV2Paginator(e.store, &s3.ListObjectsV2Input{Bucket: &e.bucket, Prefix: &prefix})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, err
		}
		for _, o := range page.Contents {
			keys = append(keys, *o.Key)
		}
	}
	return keys, nil
}

func isMissing(err error) bool {
	var missing *types.NoSuchKey
	return errors.As(err, &missing)
}
