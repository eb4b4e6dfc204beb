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

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// token is the request token of a case's operation, before and after the crash.
const token = "the-same-request"

// scenario is an operation, and the steps that it reaches.
type scenario struct {
	name  string
	steps []string
	twice []string // steps of which the second pass is tried as well
	// requests are the requests to a bucket that it makes, and the minimal number of
	// each: every one is tried.
	requests map[string]int
	quick    bool // part of a quick run
	empty    bool // starts without data
	huge     bool // starts with huge, on a bucket only
	// orphans is set when the crash may leave the object of a spilled unit, which a
	// sweep deletes after the grace period.
	orphans  bool
	settings string
	// prepare runs before the start of the snapshotd that crashes. It may start and
	// end others. May be nil.
	prepare func(ctx context.Context, r *runner, e *env) error
	// op is the operation. It is called before the crash, and again after the restart:
	// then it must succeed, unless that server crashes as well.
	op func(ctx context.Context, e *env) error
	// after enters the changes of op in the ledger. May be nil.
	after func(e *env)
}

var scenarios = []scenario{
	{
		name: "create",
		steps: []string{
			"create.begin",
			"create.manifest",
			"create.refs",
			"create.metadata",
			"create.commit",
			"create.endlease",
		},
		requests: map[string]int{"bucket.put": 2},
		quick:    true,
		op:       create,
		after:    created("new", shop),
	},
	{name: "reap", steps: []string{"create.giveup"}, prepare: leavePending, op: takeReaped, after: created("new", shop)},
	{name: "broken", steps: []string{"create.giveup"}, op: createBroken, after: created("broken", mall)},
	{
		name: "drop",
		steps: []string{
			"drop.txn",
			"drop.objects",
			"drop.record",
			"reclaim.grant",
			"held.delete",
			"file.delete",
			"reclaim.tombs",
			"collect.note",
		},
		requests: map[string]int{"bucket.delete": 3},
		orphans:  true, op: drop, after: func(e *env) { delete(e.Snapshots, old) },
	},
	{name: "expire", steps: []string{"drop.expire"}, op: expire, after: func(e *env) { delete(e.Snapshots, old) }},
	{
		name: "restore",
		steps: []string{
			"restore.admit",
			"restore.begin",
			"restore.prepare",
			"restore.prepared",
			"restore.assign",
			"restore.pin",
			"restore.copy",
			"restore.register",
			"restore.done",
			"restore.publish",
		},
		requests: map[string]int{"bucket.put": 1, "bucket.copy": 3},
		twice:    []string{"restore.pin", "restore.copy", "restore.done"}, quick: true, op: restore,
		after: func(e *env) { e.Collections["copy"], e.Restored["copy"] = copies(e.Snapshots[keep]), true },
	},
	{
		name: "give-up",
		steps: []string{
			"restore.giveup",
			"restore.giveback",
			"file.delete",
			"restore.pins",
			"restore.content",
			"restore.end",
		},
		twice:    []string{"restore.content"},
		requests: map[string]int{"bucket.delete": 1},
		op:       restoreBroken,
	},
	{name: "cancel", steps: []string{"restore.cancel"}, op: cancelRestore},
	{
		name: "parts", requests: map[string]int{"bucket.begin": 1, "bucket.part": 3, "bucket.complete": 1},
		huge: true, settings: "keep_restores: 1m\n", op: restoreHuge,
		after: func(e *env) { e.Collections["copy"], e.Restored["copy"] = copies(e.Snapshots[huge]), true },
	},
	{name: "abort", requests: map[string]int{"bucket.abort": 1}, huge: true, prepare: leaveUpload, op: restoreHugeTooSlow},
	{
		name: "late", steps: []string{"file.delete", "restore.forget"}, settings: "keep_restores: 1m\n",
		prepare: makeLate, op: awaitForgotten,
	},
	{
		name:     "reclaim",
		steps:    []string{"reclaim.confirm"},
		settings: "collector: \"off\"\n",
		op:       reclaim,
		after:    dropped(mall, 1),
	},
	{
		name:     "drop-parts",
		steps:    []string{"collect.part"},
		requests: map[string]int{"bucket.delete": 1},
		op:       dropParts,
		after: func(e *env) {
			first := e.Collections[mall][0]
			first.Files = first.Files[:1] // without the build
			e.Collections[mall] = []seg{first, e.Collections[mall][1]}
		},
	},
	{
		name: "drop-collection", steps: []string{"collect.collection"}, requests: map[string]int{"bucket.delete": 1},
		op: dropCollection, after: func(e *env) { delete(e.Collections, mall) },
	},
	{
		name: "park", steps: []string{"held.put", "park.txn"}, requests: map[string]int{"bucket.put": 1},
		orphans: true, op: park, after: dropped(shop, 0),
	},
	{
		name:     "sweep",
		steps:    []string{"file.delete"},
		requests: map[string]int{"bucket.delete": 1},
		prepare:  makeOrphan,
		op:       deleteOrphans,
	},
	{name: "allocate", steps: []string{"catalog.allocate"}, op: allocate},
	{name: "compact", steps: []string{"catalog.change"}, op: compact, after: func(e *env) {
		in := e.Collections[mall][1].ID
		e.Collections[mall] = append(without(e.Collections[mall], in), e.answers["segment"].(seg))
	}},
	{
		name: "compact-large", steps: []string{"held.put"}, requests: map[string]int{"bucket.put": 1},
		orphans: true, op: compactLarge, after: func(e *env) {
			e.Collections[mall] = append(e.Collections[mall], e.answers["segment"].(seg))
		},
	},
	{name: "pin", steps: []string{"pin.create"}, op: pin, after: func(e *env) { e.Pins++ }},
	{name: "renew", steps: []string{"pin.renew"}, op: renew},
	{name: "unpin", steps: []string{"pin.remove"}, op: unpin, after: func(e *env) { e.Pins-- }},
	{
		name: "start",
		steps: []string{
			"elect.claim",
			"restore.worker",
			"epoch.intend",
			"epoch.create",
			"epoch.done",
			"epoch.forget",
			"clock.note",
		},
		op: nothing,
	},
	{name: "resign", steps: []string{"elect.resign"}, op: resign},
	{name: "recover", steps: []string{"epoch.recover"}, op: recoverEpoch},
	{name: "recover-clock", steps: []string{"clock.recover"}, op: recoverClock},
	{name: "go-back", steps: []string{"epoch.mark"}, prepare: goBack, op: recoverEpoch},
	{
		name:  "first-start",
		steps: []string{"start.cluster", "start.identity", "start.store", "catalog.claimall"},
		empty: true,
		op:    nothing,
	},
}

// created enters a snapshot of the current content of a collection.
func created(name, of string) func(e *env) {
	return func(e *env) { e.Snapshots[name] = e.Collections[of] }
}

// dropped removes a segment from a collection, by its position.
func dropped(name string, at int) func(e *env) {
	return func(e *env) { e.Collections[name] = without(e.Collections[name], e.Collections[name][at].ID) }
}

func nothing(context.Context, *env) error { return nil }

// create takes a snapshot. A create whose process died may end as aborted.
func create(ctx context.Context, e *env) error {
	err := e.take(ctx, shop, "new", token)
	if err != nil || e.s.aborted.Load() == 0 {
		return err
	}
	committed := e.crashes[0].Step == "create.endlease" ||
		e.crashes[0] == (crash{Step: "create.commit", Side: after, Nth: 1})
	if committed || len(e.crashes) == 1 && e.crashes[0] == (crash{Step: "create.begin", Side: before, Nth: 1}) {
		return errors.New("a create that committed was aborted")
	}
	return nil
}

// leavePending kills snapshotd during a create.
func leavePending(ctx context.Context, _ *runner, e *env) error {
	return e.dieAt(
		ctx,
		crash{Step: "create.commit", Side: before, Nth: 1},
		func(ctx context.Context) error { return e.take(ctx, shop, "new", token) },
	)
}

// takeReaped waits until the leader aborts the create, and takes the name under the
// same token.
func takeReaped(ctx context.Context, e *env) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for e.asked == 0 { // a repeat under the token would abort the create itself
		_, err := e.c().Snapshots.GetSnapshot(ctx, &api.GetSnapshotRequest{Snapshot: snapshot("new")})
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
	if err := e.take(ctx, shop, "new", token); err != nil {
		return err
	}
	if e.s.aborted.Load() == 0 {
		return errors.New("the create of the dead process was not aborted")
	}
	return nil
}

// createBroken takes a snapshot of a collection without one of its files, which fails,
// and then one that succeeds.
func createBroken(ctx context.Context, e *env) error {
	file := filepath.Dir(
		e.objects(root, fmt.Sprint(e.Collection[mall]), "0", fmt.Sprint(e.Collections[mall][1].ID), "insert", "0", "x"),
	)
	aside := filepath.Join(e.dir, "aside")
	if err := os.Rename(file, aside); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	_, err := e.c().Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{
		Collection: byName(mall), Name: "broken", Verify: true, RequestToken: token,
	})
	if client.Reason(err) != "FILE_MISSING" {
		return fmt.Errorf("a create without a file ended with %w", err)
	}
	if e.asked == 0 {
		return nil
	}
	if err := os.Rename(aside, file); err != nil {
		return err
	}
	return e.take(ctx, mall, "broken", "another-request")
}

func drop(ctx context.Context, e *env) error {
	got, err := e.c().Snapshots.DropSnapshot(ctx, &api.DropSnapshotRequest{Snapshot: snapshot(old), RequestToken: token})
	if err != nil {
		return err
	}
	return e.same("snapshot that was dropped", got.GetSnapshotId())
}

func expire(ctx context.Context, e *env) error {
	if e.asked == 0 { // the repeat must be the same request
		e.answers["expire time"] = timestamppb.New(time.Now().Add(5 * time.Second))
	}
	_, err := e.c().Snapshots.UpdateSnapshot(ctx, &api.UpdateSnapshotRequest{
		Snapshot: snapshot(old), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"expire_time"}},
		ExpireTime: e.answers["expire time"].(*timestamppb.Timestamp), RequestToken: token,
	})
	if err != nil {
		return err
	}
	return eventually(ctx, func(ctx context.Context) error {
		_, err := e.c().Snapshots.GetSnapshot(ctx, &api.GetSnapshotRequest{Snapshot: snapshot(old)})
		if client.Reason(err) == "SNAPSHOT_NOT_FOUND" {
			return nil
		}
		return fmt.Errorf("the snapshot has not expired: %w", err)
	})
}

func restore(ctx context.Context, e *env) error {
	job, err := e.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(keep), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
	})
	if err != nil {
		return err
	}
	return e.ended(ctx, job, api.RestoreJob_STATE_COMPLETED)
}

// restoreBroken starts a restore, moves the files of the snapshot away once one of them
// is copied, and waits until the restore fails. Then it moves the files back.
func restoreBroken(ctx context.Context, e *env) error {
	job, err := e.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(keep), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
		Limits: &api.RestoreLimits{RequestsPerSecond: 3}, // so that most of the 36 files are not copied yet
	})
	if err != nil {
		return err
	}
	files, target := e.objects(
		root,
		fmt.Sprint(e.Collection[shop]),
	), e.objects(
		root,
		fmt.Sprint(e.answers["target of copy"]),
	)
	aside := filepath.Join(e.dir, "aside")
	copied := func() bool {
		_, missing := os.Stat(files)
		return missing != nil || holdsFile(target)
	}
	if err := e.running(ctx, job, copied); err != nil {
		return err
	}
	if err := os.Rename(files, aside); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := e.ended(ctx, job, api.RestoreJob_STATE_FAILED); err != nil {
		return err
	}
	return os.Rename(aside, files)
}

// holdsFile reports whether a directory holds a file, at any depth.
func holdsFile(dir string) (found bool) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error { // a missing directory holds none
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

// running waits until done returns true or the restore ends.
func (e *env) running(ctx context.Context, job int64, done func() bool) error {
	return eventually(ctx, func(ctx context.Context) error {
		if done() {
			return nil
		}
		got, err := e.c().Snapshots.GetRestoreState(ctx, &api.GetRestoreStateRequest{JobId: job})
		if err == nil && got.GetJob().GetState() <= api.RestoreJob_STATE_EXECUTING {
			err = errors.New("the restore has not copied a file yet")
		}
		return err
	})
}

// restoreHuge restores an object in parts, and waits until the job is removed: then no
// upload of a dead process may be left.
func restoreHuge(ctx context.Context, e *env) error {
	job, err := e.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(huge), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
	})
	if err != nil {
		return err
	}
	if err := e.ended(ctx, job, api.RestoreJob_STATE_COMPLETED); err != nil {
		return err
	}
	if err := e.ageUploads(); err != nil {
		return err
	}
	return within(ctx, time.Minute+quiet, e.forgotten)
}

// hugeTimeout is the timeout of a restore that exceeds it.
const hugeTimeout = 20 * time.Second

// leaveUpload kills snapshotd during a restore of an object in parts, and waits until
// the restore has exceeded its timeout.
func leaveUpload(ctx context.Context, _ *runner, e *env) error {
	began := time.Now()
	err := e.dieAt(
		ctx,
		crash{Step: "bucket.part", Side: before, Nth: 1},
		func(ctx context.Context) error { return restoreHugeTooSlow(ctx, e) },
	)
	if err != nil {
		return err
	}
	if err := until(ctx, began.Add(hugeTimeout)); err != nil {
		return err
	}
	if open, err := e.uploads(ctx); err != nil || len(open) != 1 {
		return fmt.Errorf("there is not one upload but %v: %w", open, err)
	}
	return nil
}

// restoreHugeTooSlow restores an object in parts, with a timeout that the crash exceeds.
func restoreHugeTooSlow(ctx context.Context, e *env) error {
	job, err := e.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot:     snapshot(huge),
		Target:       &api.CollectionName{Name: "copy"},
		RequestToken: token,
		Timeout:      durationpb.New(hugeTimeout),
	})
	if err != nil {
		return err
	}
	return e.ended(ctx, job, api.RestoreJob_STATE_FAILED)
}

// cancelRestore cancels a restore in phase copy.
func cancelRestore(ctx context.Context, e *env) error {
	job, err := e.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot: snapshot(keep), Target: &api.CollectionName{Name: "copy"}, RequestToken: token,
		Limits: &api.RestoreLimits{RequestsPerSecond: 1}, // so that it lasts for more than a minute
	})
	if err != nil {
		return err
	}
	err = eventually(ctx, func(ctx context.Context) error {
		got, err := e.c().Snapshots.GetRestoreState(ctx, &api.GetRestoreStateRequest{JobId: job})
		if err == nil && got.GetJob().GetPhase() < api.RestoreJob_PHASE_COPY {
			err = errors.New("the restore does not copy yet")
		}
		return err
	})
	if err != nil {
		return err
	}
	if _, err := e.c().Snapshots.CancelRestore(ctx, &api.CancelRestoreRequest{JobId: job}); err != nil {
		return err
	}
	return e.ended(ctx, job, api.RestoreJob_STATE_CANCELED)
}

// makeLate writes a file of a dropped segment of a restored collection again, as a late
// copy does, and waits until the job may be removed.
func makeLate(ctx context.Context, r *runner, e *env) error {
	if err := until(ctx, r.built.Add(time.Minute)); err != nil {
		return err
	}
	return e.putOld(ctx, root+e.Late)
}

// until waits until a time.
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

func awaitForgotten(ctx context.Context, e *env) error {
	if err := eventually(ctx, e.forgotten); err != nil {
		return err
	}
	if e.exists(root + e.Late) {
		return errors.New("the late copy is left")
	}
	return nil
}

// forgotten fails while a job exists.
func (e *env) forgotten(ctx context.Context) error {
	jobs, err := e.c().Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{})
	if err == nil && len(jobs.GetJobs()) > 0 {
		err = fmt.Errorf("there are %d jobs", len(jobs.GetJobs()))
	}
	return err
}

// reclaim drops a segment, deletes its files when that is granted, and confirms the
// deletion.
func reclaim(ctx context.Context, e *env) error {
	id := e.Collections[mall][1].ID
	if err := e.dropSegments(ctx, mall, id); err != nil && (e.asked == 0 || client.Reason(err) != "SEGMENT_NOT_FOUND") {
		return err // not found: it was confirmed
	}
	got, err := e.c().Reclaim.Reclaim(ctx, &api.ReclaimRequest{
		Collection: byName(mall),
		Units:      []*api.Unit{{Unit: &api.Unit_SegmentId{SegmentId: id}}},
		Deleter:    api.Deleter_DELETER_CALLER,
	})
	if err != nil {
		return err
	}
	if e.asked == 0 && got.GetResults()[0].GetTombstone() == nil {
		return fmt.Errorf("it is not granted: %v", got)
	}
	list, err := e.c().Reclaim.ListTombstones(
		ctx,
		&api.ListTombstonesRequest{Collection: byName(mall), Deleter: api.Deleter_DELETER_CALLER},
	)
	if err != nil || len(list.GetTombstones()) == 0 { // it is confirmed
		return err
	}
	done := &api.ConfirmReclaimedRequest{Collection: byName(mall)}
	for _, t := range list.GetTombstones() {
		for _, f := range t.GetFiles() {
			if err := os.Remove(e.objects(f.GetKey())); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		done.TombstoneIds = append(done.TombstoneIds, t.GetId())
	}
	_, err = e.c().Reclaim.ConfirmReclaimed(ctx, done)
	return err
}

func dropParts(ctx context.Context, e *env) error {
	_, err := e.c().Catalog.DropPartition(
		ctx,
		&api.DropPartitionRequest{Collection: byName(mall), Name: "small", RequestToken: token},
	)
	if err != nil {
		return err
	}
	_, err = e.c().Catalog.DropIndex(
		ctx,
		&api.DropIndexRequest{Collection: byName(mall), Name: "by-id", RequestToken: token + "-2"},
	)
	return err
}

func dropCollection(ctx context.Context, e *env) error {
	got, err := e.c().Catalog.DropCollection(
		ctx,
		&api.DropCollectionRequest{Collection: byName(mall), RequestToken: token},
	)
	if err != nil {
		return err
	}
	return e.same("collection that was dropped", got.GetCollectionId())
}

func park(ctx context.Context, e *env) error {
	if err := e.dropSegments(ctx, shop, e.Collections[shop][0].ID); err != nil {
		return err
	}
	return e.spilled(ctx, 2)
}

// orphan returns the key of a file with an unused id under the root of a collection.
func orphan(e *env) string {
	return fmt.Sprintf("%s%d/0/%d/insert/0/%d", root, e.Collection[shop], e.Dead[0], e.Dead[1])
}

func makeOrphan(ctx context.Context, _ *runner, e *env) error { return e.putOld(ctx, orphan(e)) }

func deleteOrphans(ctx context.Context, e *env) error {
	stream, err := e.c().Collector.DeleteOrphans(
		ctx,
		&api.DeleteOrphansRequest{Collection: byName(shop), Grace: durationpb.New(time.Hour)},
	)
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	if e.exists(orphan(e)) {
		return errors.New("the orphan is left")
	}
	return nil
}

func allocate(ctx context.Context, e *env) error {
	ids, err := e.allocate(ctx, 100, token, "id")
	if err != nil {
		return err
	}
	return e.same("first id", ids[0])
}

// partitions returns the ids of the partitions of mall.
func (e *env) partitions(ctx context.Context) (map[string]int64, error) {
	list, err := e.c().Catalog.ListPartitions(ctx, &api.ListPartitionsRequest{Collection: byName(mall)})
	partitions := map[string]int64{}
	for _, p := range list.GetPartitions() {
		partitions[p.GetName()] = p.GetId()
	}
	return partitions, err
}

// compactLarge registers segments whose records exceed one transaction, and replaces
// them.
func compactLarge(ctx context.Context, e *env) error {
	partitions, err := e.partitions(ctx)
	if err != nil {
		return err
	}
	const inputs = 3
	out := e.Spare[3*inputs : 3*inputs+3]
	if e.asked == 0 {
		add := &api.AddSegmentsRequest{Collection: byName(mall)}
		var ids []int64
		for i := range inputs {
			one, _, err := e.segment(
				ctx,
				e.Collection[mall],
				partitions,
				e.Spare[3*i:3*i+3],
				shape{partition: "main", large: true},
			)
			if err != nil {
				return err
			}
			add.Segments, ids = append(add.Segments, one), append(ids, one.GetId())
		}
		stream, err := e.c().Catalog.AddSegments(ctx)
		if err != nil {
			return err
		}
		_ = stream.Send(add) // why it fails is in the answer
		if _, err := stream.CloseAndRecv(); err != nil {
			return err
		}
		e.answers["inputs"] = ids
	}
	output, known, err := e.segment(ctx, e.Collection[mall], partitions, out, shape{partition: "main"})
	if err != nil {
		return err
	}
	e.answers["segment"] = known
	_, err = e.c().Catalog.CompactSegments(ctx, &api.CompactSegmentsRequest{
		Collection: byName(mall), Inputs: e.answers["inputs"].([]int64), Outputs: []*api.Segment{output}, RequestToken: token,
	})
	return err
}

// compact replaces a segment.
func compact(ctx context.Context, e *env) error {
	partitions, err := e.partitions(ctx)
	if err != nil {
		return err
	}
	out, known, err := e.segment(ctx, e.Collection[mall], partitions, e.Spare[:3], shape{partition: "main"})
	if err != nil {
		return err
	}
	e.answers["segment"] = known
	_, err = e.c().Catalog.CompactSegments(ctx, &api.CompactSegmentsRequest{
		Collection:   byName(mall),
		Inputs:       []int64{e.Collections[mall][1].ID},
		Outputs:      []*api.Segment{out},
		RequestToken: token,
	})
	return err
}

func pin(ctx context.Context, e *env) error {
	got, err := e.c().Snapshots.PinSnapshot(
		ctx,
		&api.PinSnapshotRequest{Snapshot: snapshot(old), Owner: "harness", RequestToken: token},
	)
	if err != nil {
		return err
	}
	if err := e.claimID(got.GetPin().GetId(), "pin "+token); err != nil {
		return err
	}
	return e.same("pin", got.GetPin().GetId())
}

func renew(ctx context.Context, e *env) error {
	_, err := e.c().Snapshots.RenewPin(
		ctx,
		&api.RenewPinRequest{Snapshot: snapshot(keep), PinId: e.Pin, Ttl: durationpb.New(2 * time.Hour)},
	)
	return err
}

func unpin(ctx context.Context, e *env) error {
	_, err := e.c().Snapshots.UnpinSnapshot(ctx, &api.UnpinSnapshotRequest{Snapshot: snapshot(keep), PinId: e.Pin})
	return err
}

// resign ends the leader with a signal.
func resign(_ context.Context, e *env) error {
	if e.asked > 0 {
		return nil
	}
	return e.s.cmd.Process.Signal(syscall.SIGTERM)
}

// recoverEpoch skips ids, with or without a rollback of etcd.
func recoverEpoch(ctx context.Context, e *env) error {
	_, err := e.c().Collector.Recover(ctx, &api.RecoverRequest{Force: true})
	return err
}

// recoverClock makes the clocks trusted.
func recoverClock(ctx context.Context, e *env) error {
	_, err := e.c().Collector.Recover(ctx, &api.RecoverRequest{Clock: true})
	return err
}

// goBack rolls etcd back behind the object store.
func goBack(ctx context.Context, _ *runner, e *env) error {
	if err := e.awaitHeartbeat(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(e.dir, "data", "etcd")); err != nil {
		return err
	}
	return copyTree(ctx, filepath.Join(e.base.dir, "data", "etcd"), filepath.Join(e.dir, "data", "etcd"))
}
