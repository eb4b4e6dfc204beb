//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// quiet bounds the wait until no work is left.
const quiet = 45 * time.Second

// audit compares the catalog, the snapshots and each object of the store with the
// ledger. With orphans, objects of spilled units whose ids are dead may be left.
func (e *env) audit(ctx context.Context, orphans bool) error {
	status, err := e.c().Collector.GetCollectorStatus(ctx, &api.GetCollectorStatusRequest{})
	switch {
	case err != nil:
		return err
	case status.GetBlocked() != "" || status.GetDeleting() > 0 || status.GetUnconfirmed() > 0:
		return fmt.Errorf("the collector has work left: %v", status)
	}
	engine := map[string]bool{} // paths in use
	if err := e.auditCollections(ctx, engine); err != nil {
		return err
	}
	own, err := e.auditSnapshots(ctx, engine)
	if err != nil {
		return err
	}
	if err := e.auditRest(ctx); err != nil {
		return err
	}
	return e.auditStore(ctx, engine, own, orphans)
}

// look returns a registered segment with the digests of its files in the store.
func (e *env) look(s *api.Segment, engine map[string]bool, partitions map[int64]string) seg {
	got := seg{ID: s.GetId(), Partition: partitions[s.GetPartitionId()]}
	files := s.GetFiles()
	for _, b := range s.GetIndexBuilds() {
		files = append(files, b.GetFiles()...)
	}
	for _, f := range files {
		engine[f.GetPath()] = true
		content, err := sumFile(e.objects(root, f.GetPath()))
		if err != nil {
			content = err.Error()
		}
		got.Files = append(got.Files, content)
	}
	return got
}

func (e *env) auditCollections(ctx context.Context, engine map[string]bool) error {
	list, err := e.c().Catalog.ListCollections(ctx, &api.ListCollectionsRequest{States: []api.Collection_State{
		api.Collection_STATE_ACTIVE, api.Collection_STATE_RESTORING, api.Collection_STATE_DROPPING,
	}})
	if err != nil {
		return err
	}
	got := map[string][]seg{}
	for _, col := range list.GetCollections() {
		if col.GetState() != api.Collection_STATE_ACTIVE {
			return fmt.Errorf("collection %s is %v", col.GetName(), col.GetState())
		}
		partitions, err := e.c().Catalog.ListPartitions(ctx, &api.ListPartitionsRequest{Collection: byName(col.GetName())})
		if err != nil {
			return err
		}
		names := map[int64]string{}
		for _, p := range partitions.GetPartitions() {
			names[p.GetId()] = p.GetName()
			if p.GetState() != api.Partition_STATE_ACTIVE {
				return fmt.Errorf("partition %s of %s is %v", p.GetName(), col.GetName(), p.GetState())
			}
		}
		segments, err := e.export(ctx, col.GetName())
		if err != nil {
			return err
		}
		got[col.GetName()] = []seg{}
		for _, s := range segments {
			one := e.look(s, engine, names)
			if e.Restored[col.GetName()] {
				one.ID = 0
			}
			got[col.GetName()] = append(got[col.GetName()], one)
		}
	}
	if diff := cmp.Diff(e.Collections, got); diff != "" {
		return fmt.Errorf("the collections are not as they were made (-want +got):\n%s", diff)
	}
	return nil
}

// auditSnapshots returns the prefixes of the snapshots' own objects.
func (e *env) auditSnapshots(ctx context.Context, engine map[string]bool) (own []string, err error) {
	list, err := e.c().Snapshots.ListSnapshots(ctx, &api.ListSnapshotsRequest{States: []api.Snapshot_State{
		api.Snapshot_STATE_PENDING, api.Snapshot_STATE_COMMITTED, api.Snapshot_STATE_DELETING,
	}})
	if err != nil {
		return nil, err
	}
	got := map[string][]seg{}
	for _, s := range list.GetSnapshots() {
		name := s.GetName()
		if _, twice := got[name]; twice || s.GetState() != api.Snapshot_STATE_COMMITTED {
			return nil, fmt.Errorf("snapshot %s (%d) is %v, or exists twice", name, s.GetId(), s.GetState())
		}
		described, err := e.c().Snapshots.DescribeSnapshot(ctx, &api.DescribeSnapshotRequest{Snapshot: snapshot(name)})
		if err != nil {
			return nil, err
		}
		own = append(own, described.GetPrefix())
		for _, m := range described.GetManifests() {
			content, err := os.ReadFile(e.objects(described.GetPrefix(), m.GetFile()))
			if err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", name, err)
			}
			if h := sha256.Sum256(content); !bytes.Equal(h[:], m.GetSha256()) {
				return nil, fmt.Errorf("snapshot %s: %s is not what was written", name, m.GetFile())
			}
		}
		partitions := map[int64]string{}
		for _, p := range described.GetPartitions() {
			partitions[p.GetId()] = p.GetName()
		}
		got[name] = []seg{}
		req := &api.ListSnapshotSegmentsRequest{Snapshot: snapshot(name), View: api.SegmentView_SEGMENT_VIEW_FILES}
		for {
			page, err := e.c().Snapshots.ListSnapshotSegments(ctx, req)
			if err != nil {
				return nil, err
			}
			for _, x := range page.GetSegments() {
				got[name] = append(got[name], e.look(x.GetSegment(), engine, partitions))
			}
			if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
				break
			}
		}
	}
	if diff := cmp.Diff(e.Snapshots, got); diff != "" {
		return nil, fmt.Errorf("the snapshots do not hold what they captured (-want +got):\n%s", diff)
	}
	return own, nil
}

// auditRest checks pins, restore jobs and tombstones.
func (e *env) auditRest(ctx context.Context) error {
	pins, err := e.c().Snapshots.ListPins(ctx, &api.ListPinsRequest{})
	if err != nil {
		return err
	}
	if len(pins.GetPins()) != e.Pins {
		return fmt.Errorf("there are %d pins, not %d: %v", len(pins.GetPins()), e.Pins, pins.GetPins())
	}
	jobs, err := e.c().Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{States: []api.RestoreJob_State{
		api.RestoreJob_STATE_PENDING, api.RestoreJob_STATE_EXECUTING,
	}})
	if err != nil {
		return err
	}
	if len(jobs.GetJobs()) > 0 {
		return fmt.Errorf("restores have not ended: %v", jobs.GetJobs())
	}
	tombs, err := e.c().Reclaim.ListTombstones(ctx, &api.ListTombstonesRequest{})
	if err != nil {
		return err
	}
	if len(tombs.GetTombstones()) > 0 {
		return fmt.Errorf("there are tombstones left: %v", tombs.GetTombstones())
	}
	return nil
}

// Objects of snapshotd that belong to no snapshot.
var (
	isEpoch  = regexp.MustCompile(`^gc/epoch/\d+\.json$`)
	isHeld   = regexp.MustCompile(`^gc/held/\d+/(\d+)(?:-[0-9a-f]{16})?$`)
	isPins   = regexp.MustCompile(`^gc/restore/(\d+)/pins-\d+-\d+\.json$`)
	isMember = regexp.MustCompile(`^snapshots/\d+/(\d+)/[^/]+$`)
)

// auditStore checks all objects. Each must have an owner, except objects of spilled
// units where a crash may leave orphans.
func (e *env) auditStore(ctx context.Context, engine map[string]bool, own []string, orphans bool) error {
	dead, err := e.orphans(ctx)
	if err != nil {
		return err
	}
	completed, err := e.completed(ctx)
	if err != nil {
		return err
	}
	wrong, err := e.uploads(ctx)
	if err != nil {
		return err
	}
	for i := range wrong {
		wrong[i] = "an upload to " + wrong[i]
	}
	err = filepath.WalkDir(e.objects(), func(name string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // it was removed during the walk
			return nil
		case err == nil && d.IsDir() && d.Name() == serverDir:
			return fs.SkipDir
		case err != nil || d.IsDir():
			return err
		}
		key, err := filepath.Rel(e.objects(), name)
		if err != nil {
			return err
		}
		key = filepath.ToSlash(key)
		path, ofEngine := strings.CutPrefix(key, root)
		member, held, pins := isMember.FindStringSubmatch(key), isHeld.FindStringSubmatch(key), isPins.FindStringSubmatch(key)
		ofSnapshot := slices.ContainsFunc(own, func(prefix string) bool { return strings.HasPrefix(key, prefix) })
		switch {
		case ofEngine && engine[path], ofSnapshot && member != nil && !dead[key],
			key == "snapshots/identity.json", isEpoch.MatchString(key), strings.HasPrefix(key, tempDir), e.ofProbe(key):
			return nil
		case held != nil && !dead[key] && len(e.Snapshots) > 0: // its unit has a record
			return nil
		case held != nil && dead[key] && orphans:
			return nil
		case pins != nil && completed[pins[1]]: // they are removed with the job's record
			return nil
		}
		wrong = append(wrong, fmt.Sprintf("%s (orphan: %v)", key, dead[key]))
		return nil
	})
	if err != nil {
		return err
	}
	if len(wrong) > 0 {
		return fmt.Errorf("objects without an owner are left: %s", strings.Join(wrong, ", "))
	}
	return nil
}

// completed returns the ids of the restore jobs that are COMPLETED and not forgotten.
func (e *env) completed(ctx context.Context) (map[string]bool, error) {
	list, err := e.c().Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{
		States: []api.RestoreJob_State{api.RestoreJob_STATE_COMPLETED},
	})
	ids := map[string]bool{}
	for _, job := range list.GetJobs() {
		ids[fmt.Sprint(job.GetId())] = true
	}
	return ids, err
}

// tempDir holds the unfinished writes of a directory store.
const tempDir = ".snapshotd-tmp/"

// orphans returns the keys of the orphans that snapshotd lists, and whether each has
// a dead id.
func (e *env) orphans(ctx context.Context) (map[string]bool, error) {
	stream, err := e.c().Collector.ListOrphans(ctx, &api.ListOrphansRequest{})
	keys := map[string]bool{}
	for err == nil {
		var part *api.ListOrphansResponse
		if part, err = stream.Recv(); err != nil {
			break
		}
		for _, o := range part.GetOrphans() {
			keys[o.GetKey()] = o.GetDeletable()
		}
	}
	if !errors.Is(err, io.EOF) {
		return nil, err
	}
	return keys, nil
}

// checkService takes a snapshot and restores a part of it. It creates a collection
// when there is none.
func (e *env) checkService(ctx context.Context) error {
	if _, ok := e.Collections[shop]; !ok {
		if err := e.collection(ctx, shop, 4, 0); err != nil {
			return err
		}
	}
	if err := e.take(ctx, shop, "last", client.NewRequestToken()); err != nil {
		return err
	}
	job, err := e.restore(ctx, &api.RestoreSnapshotRequest{
		Snapshot:     snapshot("last"),
		Target:       &api.CollectionName{Name: "last"},
		Partitions:   []string{"small"},
		RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		return err
	}
	if err := e.ended(ctx, job, api.RestoreJob_STATE_COMPLETED); err != nil {
		return err
	}
	e.Snapshots["last"] = e.Collections[shop]
	e.Collections["last"], e.Restored["last"] = copies(e.Collections[shop], "small"), true
	return e.fresh(ctx)
}

// fresh checks that newly allocated ids were not allocated before.
func (e *env) fresh(ctx context.Context) error {
	_, err := e.allocate(ctx, 3, client.NewRequestToken(), "fresh id")
	return err
}

// dropAll drops everything.
func (e *env) dropAll(ctx context.Context) error {
	pins, err := e.c().Snapshots.ListPins(ctx, &api.ListPinsRequest{})
	if err != nil {
		return err
	}
	for _, p := range pins.GetPins() {
		ref := &api.SnapshotRef{Ref: &api.SnapshotRef_Id{Id: p.GetSnapshotId()}}
		if _, err := e.c().Snapshots.UnpinSnapshot(
			ctx,
			&api.UnpinSnapshotRequest{Snapshot: ref, PinId: p.GetId()},
		); err != nil {
			return err
		}
	}
	for name := range e.Snapshots {
		if _, err := e.c().Snapshots.DropSnapshot(
			ctx,
			&api.DropSnapshotRequest{Snapshot: snapshot(name), RequestToken: client.NewRequestToken()},
		); err != nil {
			return err
		}
	}
	for name := range e.Collections {
		if _, err := e.c().Catalog.DropCollection(
			ctx,
			&api.DropCollectionRequest{Collection: byName(name), RequestToken: client.NewRequestToken()},
		); err != nil {
			return err
		}
	}
	e.Snapshots, e.Collections, e.Pins = map[string][]seg{}, map[string][]seg{}, 0
	return nil
}

// putOld puts an object with an old modification time into the store.
func (e *env) putOld(ctx context.Context, key string) error {
	if err := e.put(ctx, key, []byte("late")); err != nil {
		return err
	}
	return os.Chtimes(e.objects(key), longAgo(), longAgo())
}

// exists reports whether an object exists.
func (e *env) exists(key string) bool {
	_, err := os.Stat(e.objects(key))
	return err == nil
}
