//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// scenario is an operation, and the points that it comes by.
type scenario struct {
	points []string
	twice  []string // points at which the second time is tried as well
	quick  bool     // it is part of a quick run
	empty  bool     // it begins with no data
	// orphans says that the crash may leave the object of a unit that was parked,
	// which a sweep deletes after the grace period.
	orphans  bool
	settings string
	// prepare comes before snapshotd is started that will crash. It may start and
	// end others. Nil: nothing.
	prepare func(ctx context.Context, r *runner, w *world) error
	// op is the operation. It is called while snapshotd is there that crashes, and
	// again, with the next, when it has to succeed.
	op func(ctx context.Context, w *world) error
	// after enters in the ledger what op has changed. Nil: nothing.
	after func(w *world)
}

var scenarios = []scenario{
	{
		points: []string{"create.begin", "create.manifest", "create.refs", "create.metadata", "create.commit", "create.endlease"},
		quick:  true, op: create, after: created("new", shop),
	},
	{points: []string{"create.reap"}, prepare: leavePending, op: takeReaped, after: created("new", shop)},
	{points: []string{"create.giveup"}, op: createBroken, after: created("broken", mall)},
	{
		points: []string{
			"drop.txn", "drop.objects", "drop.record", "reclaim.grant", "reclaim.held", "reclaim.delete", "reclaim.tombs", "collect.note",
		},
		orphans: true, op: drop, after: func(w *world) { delete(w.Snapshots, old) },
	},
	{points: []string{"drop.expire"}, op: expire, after: func(w *world) { delete(w.Snapshots, old) }},
	{
		points: []string{
			"restore.admit", "restore.begin", "restore.prepare", "restore.prepared", "restore.assign", "restore.copy", "restore.register",
			"restore.done", "restore.publish",
		},
		twice: []string{"restore.copy", "restore.done"}, quick: true, op: restore,
		after: func(w *world) { w.Collections["copy"], w.Restored["copy"] = copies(w.Snapshots[keep]), true },
	},
	{
		points: []string{"restore.giveup", "restore.giveback", "restore.objects", "restore.content", "restore.end"},
		twice:  []string{"restore.content"}, op: restoreTooSlow,
	},
	{points: []string{"restore.cancel"}, op: cancelRestore},
	{
		points: []string{"restore.late", "restore.forget"}, settings: "keep_restores: 1m\n",
		prepare: makeLate, op: awaitForgotten,
	},
	{points: []string{"reclaim.confirm"}, settings: "collector: \"off\"\n", op: reclaim, after: dropped(mall, 1)},
	{points: []string{"collect.part"}, op: dropParts, after: func(w *world) {
		first := w.Collections[mall][0]
		first.Files = first.Files[:1] // without the build
		w.Collections[mall] = []seg{first, w.Collections[mall][1]}
	}},
	{points: []string{"collect.collection"}, op: dropCollection, after: func(w *world) { delete(w.Collections, mall) }},
	{points: []string{"park.put", "park.txn"}, orphans: true, op: park, after: dropped(shop, 0)},
	{points: []string{"sweep.delete"}, prepare: makeOrphan, op: deleteOrphans},
	{points: []string{"catalog.allocate"}, op: allocate},
	{points: []string{"catalog.change"}, op: compact, after: func(w *world) {
		in := w.Collections[mall][1].ID
		w.Collections[mall] = append(without(w.Collections[mall], in), w.answers["segment"].(seg))
	}},
	{points: []string{"pin.create"}, op: pin, after: func(w *world) { w.Pins++ }},
	{points: []string{"pin.renew"}, op: renew},
	{points: []string{"pin.remove"}, op: unpin, after: func(w *world) { w.Pins-- }},
	{points: []string{"elect.claim", "restore.worker", "epoch.intend", "epoch.create", "epoch.done", "epoch.forget"}, op: nothing},
	{points: []string{"elect.resign"}, op: resign},
	{points: []string{"epoch.recover"}, op: recoverEpoch},
	{points: []string{"epoch.mark"}, prepare: goBack, op: recoverEpoch},
	{points: []string{"start.cluster", "start.identity", "start.store"}, empty: true, op: first},
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

// create takes a snapshot. A create whose process died may end as given up, and its
// token then says so for good: then the name must be free.
func create(ctx context.Context, w *world) error {
	err := w.take(ctx, shop, "new", token)
	if client.Reason(err) != "CREATE_ABORTED" {
		return err
	}
	if at := w.crash; at.point == "create.endlease" || at == (crash{"create.commit", after, 1}) || at == (crash{"create.begin", before, 1}) {
		return fmt.Errorf("it cannot have been given up: %w", err)
	}
	if id, ok := w.answers["snapshot new"]; ok {
		return fmt.Errorf("snapshot %d was answered with success before: %w", id, err)
	}
	return w.take(ctx, shop, "new", "another-request")
}

// leavePending has snapshotd die in the middle of a create.
func leavePending(ctx context.Context, _ *runner, w *world) error {
	at := crash{"create.commit", before, 1}
	if err := w.start(ctx, at.String()); err != nil {
		return err
	}
	running, done := w.s.whileRunning(ctx)
	defer done()
	err := w.take(running, shop, "new", token)
	if err == nil {
		return errors.New("the create succeeded without its commit")
	}
	return w.s.crashed(ctx, crashPatience, at.String())
}

// takeReaped waits for the leader to give the create up, and takes the name.
func takeReaped(ctx context.Context, w *world) error {
	if err := w.take(ctx, shop, "new", token); client.Reason(err) != "CREATE_ABORTED" {
		return fmt.Errorf("the create that died was answered with %w", err)
	}
	return w.take(ctx, shop, "new", "another-request")
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
	if reason := client.Reason(err); reason != "FILE_MISSING" && reason != "CREATE_ABORTED" {
		return fmt.Errorf("a create that lacks a file ended with %w", err)
	}
	if w.armed {
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
	if w.armed { // the repeat must be the same request
		w.answers["expire time"] = timestamppb.New(time.Now().Add(2 * time.Second))
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

// restoreTooSlow restores in less time than it takes.
func restoreTooSlow(ctx context.Context, w *world) error {
	job, err := w.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(keep), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
		Limits: &api.RestoreLimits{RequestsPerSecond: 10}, Timeout: durationpb.New(3 * time.Second),
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
		Limits: &api.RestoreLimits{RequestsPerSecond: 3},
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
	timer := time.NewTimer(time.Until(r.built.Add(time.Minute)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return w.plant(root + w.Late)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func awaitForgotten(ctx context.Context, w *world) error {
	return eventually(ctx, func(ctx context.Context) error {
		jobs, err := w.c().Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{})
		if err == nil && (len(jobs.GetJobs()) > 0 || w.planted(root+w.Late)) {
			err = fmt.Errorf("the late copy is there: %v, and so are %d jobs", w.planted(root+w.Late), len(jobs.GetJobs()))
		}
		return err
	})
}

// reclaim drops a segment, deletes its files itself when that is granted, and
// confirms it.
func reclaim(ctx context.Context, w *world) error {
	id := w.Collections[mall][1].ID
	if err := w.dropSegments(ctx, mall, id); err != nil && (w.armed || client.Reason(err) != "SEGMENT_NOT_FOUND") {
		return err // not found: it was confirmed
	}
	got, err := w.c().Reclaim.Reclaim(ctx, &api.ReclaimRequest{
		Collection: byName(mall), Units: []*api.Unit{{Unit: &api.Unit_SegmentId{SegmentId: id}}}, Deleter: api.Deleter_DELETER_CALLER,
	})
	if err != nil {
		return err
	}
	if w.armed && got.GetResults()[0].GetTombstone() == nil {
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

func makeOrphan(_ context.Context, _ *runner, w *world) error { return w.plant(orphan(w)) }

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

// compact replaces a segment.
func compact(ctx context.Context, w *world) error {
	list, err := w.c().Catalog.ListPartitions(ctx, &api.ListPartitionsRequest{Collection: byName(mall)})
	if err != nil {
		return err
	}
	partitions := map[string]int64{}
	for _, p := range list.GetPartitions() {
		partitions[p.GetName()] = p.GetId()
	}
	out, known, err := w.segment(w.Collection[mall], partitions, w.Spare[:3], shape{partition: "main"})
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
	if !w.armed {
		return nil
	}
	return w.s.cmd.Process.Signal(syscall.SIGTERM)
}

// recoverEpoch passes over ids, whether etcd went back or not.
func recoverEpoch(ctx context.Context, w *world) error {
	_, err := w.c().Collector.Recover(ctx, &api.RecoverRequest{Force: true})
	return err
}

// goBack has the object store get ahead of etcd.
func goBack(ctx context.Context, r *runner, w *world) error {
	if err := w.beats(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(w.dir, "data", "etcd")); err != nil {
		return err
	}
	return copyTree(ctx, filepath.Join(r.base.dir, "data", "etcd"), filepath.Join(w.dir, "data", "etcd"))
}

// first makes a collection and a snapshot where there was nothing before.
func first(ctx context.Context, w *world) error {
	if w.armed {
		return nil
	}
	if err := w.collection(ctx, shop, 4, 0); err != nil {
		return err
	}
	w.Snapshots[keep] = w.Collections[shop]
	return w.take(ctx, shop, keep, token)
}
