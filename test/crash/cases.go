//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1" //nolint:depguard // the harness is a client
	"github.com/snapshotd/snapshotd/client"
)

// token is the request token of a case's operation, the same before and after the
// crash.
const token = "the-same-request"

// scenario is an operation, and the steps that it reaches.
type scenario struct {
	name  string
	steps []string
	twice []string // steps of which the second pass is tried as well
	// requests are the requests to a bucket that it makes, and the minimal number of
	// each: every one is tried.
	requests map[string]int
	quick    bool // it is part of a quick run
	empty    bool // it begins with no data
	huge     bool // it begins with huge, and runs on a bucket only
	// orphans says that the crash may leave the object of a unit that was parked,
	// which a sweep deletes after the grace period.
	orphans  bool
	settings string
	// prepare comes before snapshotd is started that will crash. It may start and
	// end others. Nil: nothing.
	prepare func(ctx context.Context, r *runner, w *world) error
	// op is the operation. It is called while snapshotd is there that crashes, and
	// again, with the next, when it has to succeed unless that one crashes as well.
	op func(ctx context.Context, w *world) error
	// after enters in the ledger what op has changed. Nil: nothing.
	after func(w *world)
}

var scenarios = []scenario{
	{
		name:     "create",
		steps:    []string{"create.begin", "create.manifest", "create.refs", "create.metadata", "create.commit", "create.endlease"},
		requests: map[string]int{"bucket.put": 2},
		quick:    true, op: create, after: created("new", shop),
	},
	{name: "reap", steps: []string{"create.giveup"}, prepare: leavePending, op: takeReaped, after: created("new", shop)},
	{name: "broken", steps: []string{"create.giveup"}, op: createBroken, after: created("broken", mall)},
	{
		name: "drop",
		steps: []string{
			"drop.txn", "drop.objects", "drop.record", "reclaim.grant", "held.delete", "file.delete", "reclaim.tombs", "collect.note",
		},
		requests: map[string]int{"bucket.delete": 3},
		orphans:  true, op: drop, after: func(w *world) { delete(w.Snapshots, old) },
	},
	{name: "expire", steps: []string{"drop.expire"}, op: expire, after: func(w *world) { delete(w.Snapshots, old) }},
	{
		name: "restore",
		steps: []string{
			"restore.admit", "restore.begin", "restore.prepare", "restore.prepared", "restore.assign", "restore.pin", "restore.copy",
			"restore.register", "restore.done", "restore.publish",
		},
		requests: map[string]int{"bucket.put": 1, "bucket.copy": 3},
		twice:    []string{"restore.pin", "restore.copy", "restore.done"}, quick: true, op: restore,
		after: func(w *world) { w.Collections["copy"], w.Restored["copy"] = copies(w.Snapshots[keep]), true },
	},
	{
		name:  "give-up",
		steps: []string{"restore.giveup", "restore.giveback", "file.delete", "restore.pins", "restore.content", "restore.end"},
		twice: []string{"restore.content"}, requests: map[string]int{"bucket.delete": 1}, op: restoreBroken,
	},
	{name: "cancel", steps: []string{"restore.cancel"}, op: cancelRestore},
	{
		name: "parts", requests: map[string]int{"bucket.begin": 1, "bucket.part": 3, "bucket.complete": 1},
		huge: true, settings: "keep_restores: 1m\n", op: restoreHuge,
		after: func(w *world) { w.Collections["copy"], w.Restored["copy"] = copies(w.Snapshots[huge]), true },
	},
	{name: "abort", requests: map[string]int{"bucket.abort": 1}, huge: true, prepare: leaveUpload, op: restoreHugeTooSlow},
	{
		name: "late", steps: []string{"file.delete", "restore.forget"}, settings: "keep_restores: 1m\n",
		prepare: makeLate, op: awaitForgotten,
	},
	{name: "reclaim", steps: []string{"reclaim.confirm"}, settings: "collector: \"off\"\n", op: reclaim, after: dropped(mall, 1)},
	{name: "drop-parts", steps: []string{"collect.part"}, requests: map[string]int{"bucket.delete": 1}, op: dropParts, after: func(w *world) {
		first := w.Collections[mall][0]
		first.Files = first.Files[:1] // without the build
		w.Collections[mall] = []seg{first, w.Collections[mall][1]}
	}},
	{
		name: "drop-collection", steps: []string{"collect.collection"}, requests: map[string]int{"bucket.delete": 1},
		op: dropCollection, after: func(w *world) { delete(w.Collections, mall) },
	},
	{
		name: "park", steps: []string{"held.put", "park.txn"}, requests: map[string]int{"bucket.put": 1},
		orphans: true, op: park, after: dropped(shop, 0),
	},
	{name: "sweep", steps: []string{"file.delete"}, requests: map[string]int{"bucket.delete": 1}, prepare: makeOrphan, op: deleteOrphans},
	{name: "allocate", steps: []string{"catalog.allocate"}, op: allocate},
	{name: "compact", steps: []string{"catalog.change"}, op: compact, after: func(w *world) {
		in := w.Collections[mall][1].ID
		w.Collections[mall] = append(without(w.Collections[mall], in), w.answers["segment"].(seg))
	}},
	{
		name: "compact-large", steps: []string{"held.put"}, requests: map[string]int{"bucket.put": 1},
		orphans: true, op: compactLarge, after: func(w *world) {
			w.Collections[mall] = append(w.Collections[mall], w.answers["segment"].(seg))
		},
	},
	{name: "pin", steps: []string{"pin.create"}, op: pin, after: func(w *world) { w.Pins++ }},
	{name: "renew", steps: []string{"pin.renew"}, op: renew},
	{name: "unpin", steps: []string{"pin.remove"}, op: unpin, after: func(w *world) { w.Pins-- }},
	{
		name:  "start",
		steps: []string{"elect.claim", "restore.worker", "epoch.intend", "epoch.create", "epoch.done", "epoch.forget", "clock.note"}, op: nothing,
	},
	{name: "resign", steps: []string{"elect.resign"}, op: resign},
	{name: "recover", steps: []string{"epoch.recover"}, op: recoverEpoch},
	{name: "recover-clock", steps: []string{"clock.recover"}, op: recoverClock},
	{name: "go-back", steps: []string{"epoch.mark"}, prepare: goBack, op: recoverEpoch},
	{name: "first-start", steps: []string{"start.cluster", "start.identity", "start.store", "catalog.claimall"}, empty: true, op: nothing},
}

// created enters a snapshot of what a collection has now.
func created(name, of string) func(w *world) {
	return func(w *world) { w.Snapshots[name] = w.Collections[of] }
}

// dropped takes a segment from a collection, by its place.
func dropped(name string, at int) func(w *world) {
	return func(w *world) { w.Collections[name] = without(w.Collections[name], w.Collections[name][at].ID) }
}

func nothing(context.Context, *world) error { return nil }

// create takes a snapshot. A create whose process died may end as given up.
func create(ctx context.Context, w *world) error {
	err := w.take(ctx, shop, "new", token)
	if err != nil || w.s.aborted.Load() == 0 {
		return err
	}
	committed := w.crashes[0].Step == "create.endlease" || w.crashes[0] == (crash{Step: "create.commit", Side: after, Nth: 1})
	if committed || len(w.crashes) == 1 && w.crashes[0] == (crash{Step: "create.begin", Side: before, Nth: 1}) {
		return errors.New("it was given up, which cannot be")
	}
	return nil
}

// leavePending has snapshotd die in the middle of a create.
func leavePending(ctx context.Context, _ *runner, w *world) error {
	return w.dieAt(ctx, crash{Step: "create.commit", Side: before, Nth: 1}, func(ctx context.Context) error { return w.take(ctx, shop, "new", token) })
}

// takeReaped waits for the leader to give the create up, and takes the name under
// the same token.
func takeReaped(ctx context.Context, w *world) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for w.asked == 0 { // a repeat under the token would do what the leader does
		_, err := w.c().Snapshots.GetSnapshot(ctx, &api.GetSnapshotRequest{Snapshot: snapshot("new")})
		if client.Reason(err) == "SNAPSHOT_NOT_FOUND" {
			break
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	if err := w.take(ctx, shop, "new", token); err != nil {
		return err
	}
	if w.s.aborted.Load() == 0 {
		return errors.New("the create that died was not given up")
	}
	return nil
}

// createBroken takes a snapshot of a collection that lacks a file, which fails, and
// then one that succeeds.
func createBroken(ctx context.Context, w *world) error {
	file := filepath.Dir(w.objects(root, fmt.Sprint(w.Collection[mall]), "0", fmt.Sprint(w.Collections[mall][1].ID), "insert", "0", "x"))
	aside := filepath.Join(w.dir, "aside")
	if err := os.Rename(file, aside); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	_, err := w.c().Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{
		Collection: byName(mall), Name: "broken", Verify: true, RequestToken: token,
	})
	if client.Reason(err) != "FILE_MISSING" {
		return fmt.Errorf("a create that lacks a file ended with %w", err)
	}
	if w.asked == 0 {
		return nil
	}
	if err := os.Rename(aside, file); err != nil {
		return err
	}
	return w.take(ctx, mall, "broken", "another-request")
}

func drop(ctx context.Context, w *world) error {
	got, err := w.c().Snapshots.DropSnapshot(ctx, &api.DropSnapshotRequest{Snapshot: snapshot(old), RequestToken: token})
	if err != nil {
		return err
	}
	return w.same("snapshot that was dropped", got.GetSnapshotId())
}

func expire(ctx context.Context, w *world) error {
	if w.asked == 0 { // the repeat must be the same request
		w.answers["expire time"] = timestamppb.New(time.Now().Add(5 * time.Second))
	}
	_, err := w.c().Snapshots.UpdateSnapshot(ctx, &api.UpdateSnapshotRequest{
		Snapshot: snapshot(old), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"expire_time"}},
		ExpireTime: w.answers["expire time"].(*timestamppb.Timestamp), RequestToken: token,
	})
	if err != nil {
		return err
	}
	return eventually(ctx, func(ctx context.Context) error {
		_, err := w.c().Snapshots.GetSnapshot(ctx, &api.GetSnapshotRequest{Snapshot: snapshot(old)})
		if client.Reason(err) == "SNAPSHOT_NOT_FOUND" {
			return nil
		}
		return fmt.Errorf("the snapshot has not expired: %w", err)
	})
}

func restore(ctx context.Context, w *world) error {
	job, err := w.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(keep), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
	})
	if err != nil {
		return err
	}
	return w.ended(ctx, job, api.RestoreJob_STATE_COMPLETED)
}

// restoreBroken begins a restore, takes the files of the snapshot away once one of
// them is copied, and waits for the restore to fail. Then the files are put back.
func restoreBroken(ctx context.Context, w *world) error {
	job, err := w.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(keep), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
		Limits: &api.RestoreLimits{RequestsPerSecond: 3}, // so that most of the 36 files are not copied yet
	})
	if err != nil {
		return err
	}
	files, target := w.objects(root, fmt.Sprint(w.Collection[shop])), w.objects(root, fmt.Sprint(w.answers["target of copy"]))
	aside := filepath.Join(w.dir, "aside")
	copied := func() bool {
		_, missing := os.Stat(files)
		return missing != nil || holdsFile(target)
	}
	if err := w.running(ctx, job, copied); err != nil {
		return err
	}
	if err := os.Rename(files, aside); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := w.ended(ctx, job, api.RestoreJob_STATE_FAILED); err != nil {
		return err
	}
	return os.Rename(aside, files)
}

// holdsFile says whether there is a file in a directory or below.
func holdsFile(dir string) (found bool) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error { // a directory that is gone holds none
		if err != nil {
			return err
		}
		if found = e.Type().IsRegular(); found {
			return fs.SkipAll
		}
		return nil
	})
	return found
}

// running waits until done returns true, or the restore has ended.
func (w *world) running(ctx context.Context, job int64, done func() bool) error {
	return eventually(ctx, func(ctx context.Context) error {
		if done() {
			return nil
		}
		got, err := w.c().Snapshots.GetRestoreState(ctx, &api.GetRestoreStateRequest{JobId: job})
		if err == nil && got.GetJob().GetState() <= api.RestoreJob_STATE_EXECUTING {
			err = errors.New("the restore has not copied a file yet")
		}
		return err
	})
}

// restoreHuge restores an object in parts, and waits for the job to be forgotten: by
// then no upload may be left that a process has begun that died.
func restoreHuge(ctx context.Context, w *world) error {
	job, err := w.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(huge), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
	})
	if err != nil {
		return err
	}
	if err := w.ended(ctx, job, api.RestoreJob_STATE_COMPLETED); err != nil {
		return err
	}
	if err := w.ageUploads(); err != nil {
		return err
	}
	return within(ctx, time.Minute+quiet, w.forgotten)
}

// hugeTimeout is of a restore that is to fail for it.
const hugeTimeout = 20 * time.Second

// leaveUpload has snapshotd die in the middle of a restore of an object in parts, and
// waits until it is too late to go on with that.
func leaveUpload(ctx context.Context, _ *runner, w *world) error {
	began := time.Now()
	err := w.dieAt(ctx, crash{Step: "bucket.part", Side: before, Nth: 1}, func(ctx context.Context) error { return restoreHugeTooSlow(ctx, w) })
	if err != nil {
		return err
	}
	if err := until(ctx, began.Add(hugeTimeout)); err != nil {
		return err
	}
	if open, err := w.uploads(ctx); err != nil || len(open) != 1 {
		return fmt.Errorf("there is not one upload but %v: %w", open, err)
	}
	return nil
}

// restoreHugeTooSlow restores an object in parts, for which there is no time any more
// after the crash.
func restoreHugeTooSlow(ctx context.Context, w *world) error {
	job, err := w.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(huge), Target: &api.CollectionName{Name: "copy"}, RequestToken: token, Timeout: durationpb.New(hugeTimeout),
	})
	if err != nil {
		return err
	}
	return w.ended(ctx, job, api.RestoreJob_STATE_FAILED)
}

// cancelRestore cancels a restore that has begun to copy.
func cancelRestore(ctx context.Context, w *world) error {
	job, err := w.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(keep), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
		Limits: &api.RestoreLimits{RequestsPerSecond: 1}, // so that it lasts for more than a minute
	})
	if err != nil {
		return err
	}
	err = eventually(ctx, func(ctx context.Context) error {
		got, err := w.c().Snapshots.GetRestoreState(ctx, &api.GetRestoreStateRequest{JobId: job})
		if err == nil && got.GetJob().GetPhase() < api.RestoreJob_PHASE_COPY {
			err = errors.New("the restore does not copy yet")
		}
		return err
	})
	if err != nil {
		return err
	}
	if _, err := w.c().Snapshots.CancelRestore(ctx, &api.CancelRestoreRequest{JobId: job}); err != nil {
		return err
	}
	return w.ended(ctx, job, api.RestoreJob_STATE_CANCELED)
}

// makeLate puts a file back that a restored collection has dropped, as a copy that
// comes late would, and waits until the job may be forgotten.
func makeLate(ctx context.Context, r *runner, w *world) error {
	if err := until(ctx, r.built.Add(time.Minute)); err != nil {
		return err
	}
	return w.plant(ctx, root+w.Late)
}

// until waits for a time.
func until(ctx context.Context, at time.Time) error {
	timer := time.NewTimer(time.Until(at))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func awaitForgotten(ctx context.Context, w *world) error {
	if err := eventually(ctx, w.forgotten); err != nil {
		return err
	}
	if w.planted(root + w.Late) {
		return errors.New("the late copy is there")
	}
	return nil
}

// forgotten is an error while there is a job.
func (w *world) forgotten(ctx context.Context) error {
	jobs, err := w.c().Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{})
	if err == nil && len(jobs.GetJobs()) > 0 {
		err = fmt.Errorf("there are %d jobs", len(jobs.GetJobs()))
	}
	return err
}

// reclaim drops a segment, deletes its files itself when that is granted, and
// confirms it.
func reclaim(ctx context.Context, w *world) error {
	id := w.Collections[mall][1].ID
	if err := w.dropSegments(ctx, mall, id); err != nil && (w.asked == 0 || client.Reason(err) != "SEGMENT_NOT_FOUND") {
		return err // not found: it was confirmed
	}
	got, err := w.c().Reclaim.Reclaim(ctx, &api.ReclaimRequest{
		Collection: byName(mall), Units: []*api.Unit{{Unit: &api.Unit_SegmentId{SegmentId: id}}}, Deleter: api.Deleter_DELETER_CALLER,
	})
	if err != nil {
		return err
	}
	if w.asked == 0 && got.GetResults()[0].GetTombstone() == nil {
		return fmt.Errorf("it is not granted: %v", got)
	}
	list, err := w.c().Reclaim.ListTombstones(ctx, &api.ListTombstonesRequest{Collection: byName(mall), Deleter: api.Deleter_DELETER_CALLER})
	if err != nil || len(list.GetTombstones()) == 0 { // it is confirmed
		return err
	}
	done := &api.ConfirmReclaimedRequest{Collection: byName(mall)}
	for _, t := range list.GetTombstones() {
		for _, f := range t.GetFiles() {
			if err := os.Remove(w.objects(f.GetKey())); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		done.TombstoneIds = append(done.TombstoneIds, t.GetId())
	}
	_, err = w.c().Reclaim.ConfirmReclaimed(ctx, done)
	return err
}

func dropParts(ctx context.Context, w *world) error {
	_, err := w.c().Catalog.DropPartition(ctx, &api.DropPartitionRequest{Collection: byName(mall), Name: "small", RequestToken: token})
	if err != nil {
		return err
	}
	_, err = w.c().Catalog.DropIndex(ctx, &api.DropIndexRequest{Collection: byName(mall), Name: "by-id", RequestToken: token + "-2"})
	return err
}

func dropCollection(ctx context.Context, w *world) error {
	got, err := w.c().Catalog.DropCollection(ctx, &api.DropCollectionRequest{Collection: byName(mall), RequestToken: token})
	if err != nil {
		return err
	}
	return w.same("collection that was dropped", got.GetCollectionId())
}

func park(ctx context.Context, w *world) error {
	if err := w.dropSegments(ctx, shop, w.Collections[shop][0].ID); err != nil {
		return err
	}
	return w.parked(ctx, 2)
}

// orphan is a file under the root of a collection, of an id that nothing has.
func orphan(w *world) string {
	return fmt.Sprintf("%s%d/0/%d/insert/0/%d", root, w.Collection[shop], w.Dead[0], w.Dead[1])
}

func makeOrphan(ctx context.Context, _ *runner, w *world) error { return w.plant(ctx, orphan(w)) }

func deleteOrphans(ctx context.Context, w *world) error {
	stream, err := w.c().Collector.DeleteOrphans(ctx, &api.DeleteOrphansRequest{Collection: byName(shop), Grace: durationpb.New(time.Hour)})
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	if w.planted(orphan(w)) {
		return errors.New("the orphan is there")
	}
	return nil
}

func allocate(ctx context.Context, w *world) error {
	ids, err := w.allocate(ctx, 100, token, "id")
	if err != nil {
		return err
	}
	return w.same("first id", ids[0])
}

// partitions returns the ids of the partitions of mall.
func (w *world) partitions(ctx context.Context) (map[string]int64, error) {
	list, err := w.c().Catalog.ListPartitions(ctx, &api.ListPartitionsRequest{Collection: byName(mall)})
	partitions := map[string]int64{}
	for _, p := range list.GetPartitions() {
		partitions[p.GetName()] = p.GetId()
	}
	return partitions, err
}

// compactLarge registers segments whose records do not fit in one transaction, and
// replaces them.
func compactLarge(ctx context.Context, w *world) error {
	partitions, err := w.partitions(ctx)
	if err != nil {
		return err
	}
	const inputs = 3
	out := w.Spare[3*inputs : 3*inputs+3]
	if w.asked == 0 {
		add := &api.AddSegmentsRequest{Collection: byName(mall)}
		var ids []int64
		for i := range inputs {
			one, _, err := w.segment(ctx, w.Collection[mall], partitions, w.Spare[3*i:3*i+3], shape{partition: "main", large: true})
			if err != nil {
				return err
			}
			add.Segments, ids = append(add.Segments, one), append(ids, one.GetId())
		}
		stream, err := w.c().Catalog.AddSegments(ctx)
		if err != nil {
			return err
		}
		_ = stream.Send(add) // why it fails is in the answer
		if _, err := stream.CloseAndRecv(); err != nil {
			return err
		}
		w.answers["inputs"] = ids
	}
	output, known, err := w.segment(ctx, w.Collection[mall], partitions, out, shape{partition: "main"})
	if err != nil {
		return err
	}
	w.answers["segment"] = known
	_, err = w.c().Catalog.CompactSegments(ctx, &api.CompactSegmentsRequest{
		Collection: byName(mall), Inputs: w.answers["inputs"].([]int64), Outputs: []*api.Segment{output}, RequestToken: token,
	})
	return err
}

// compact replaces a segment.
func compact(ctx context.Context, w *world) error {
	partitions, err := w.partitions(ctx)
	if err != nil {
		return err
	}
	out, known, err := w.segment(ctx, w.Collection[mall], partitions, w.Spare[:3], shape{partition: "main"})
	if err != nil {
		return err
	}
	w.answers["segment"] = known
	_, err = w.c().Catalog.CompactSegments(ctx, &api.CompactSegmentsRequest{
		Collection: byName(mall), Inputs: []int64{w.Collections[mall][1].ID}, Outputs: []*api.Segment{out}, RequestToken: token,
	})
	return err
}

func pin(ctx context.Context, w *world) error {
	got, err := w.c().Snapshots.PinSnapshot(ctx, &api.PinSnapshotRequest{Snapshot: snapshot(old), Owner: "harness", RequestToken: token})
	if err != nil {
		return err
	}
	if err := w.took(got.GetPin().GetId(), "pin "+token); err != nil {
		return err
	}
	return w.same("pin", got.GetPin().GetId())
}

func renew(ctx context.Context, w *world) error {
	_, err := w.c().Snapshots.RenewPin(ctx, &api.RenewPinRequest{Snapshot: snapshot(keep), PinId: w.Pin, Ttl: durationpb.New(2 * time.Hour)})
	return err
}

func unpin(ctx context.Context, w *world) error {
	_, err := w.c().Snapshots.UnpinSnapshot(ctx, &api.UnpinSnapshotRequest{Snapshot: snapshot(keep), PinId: w.Pin})
	return err
}

// resign tells the leader to end.
func resign(_ context.Context, w *world) error {
	if w.asked > 0 {
		return nil
	}
	return w.s.cmd.Process.Signal(syscall.SIGTERM)
}

// recoverEpoch passes over ids, whether etcd went back or not.
func recoverEpoch(ctx context.Context, w *world) error {
	_, err := w.c().Collector.Recover(ctx, &api.RecoverRequest{Force: true})
	return err
}

// recoverClock has the clocks trusted, whether they were or not.
func recoverClock(ctx context.Context, w *world) error {
	_, err := w.c().Collector.Recover(ctx, &api.RecoverRequest{Clock: true})
	return err
}

// goBack has the object store get ahead of etcd.
func goBack(ctx context.Context, _ *runner, w *world) error {
	if err := w.beats(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(w.dir, "data", "etcd")); err != nil {
		return err
	}
	return copyTree(ctx, filepath.Join(w.base.dir, "data", "etcd"), filepath.Join(w.dir, "data", "etcd"))
}
