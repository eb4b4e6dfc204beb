//go:build !short && unix

package embed_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/embed"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
)

// TestCopyOfTheDataDirectory stops an embedded server, copies its data directory
// with its times, and restores from the copy two segments with ETags: one of an
// earlier release, whose ETag has the inode, and a restored one.
func TestCopyOfTheDataDirectory(t *testing.T) {
	cfg := small(t)
	put := putFile(t, filepath.Join(cfg.DataDir, "objects"))
	run := func(f func(s *embed.Server)) {
		t.Helper()
		s, err := embed.Start(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		f(s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	run(func(s *embed.Server) {
		if err := createCollection(t.Context(), s.Conn(), "c"); err != nil {
			t.Fatal(err)
		}
		register(t, s, "c", put.Size, put.ETag+"-7a1c")
		restore(t, s, "c", "s0", "first")
		restore(t, s, "first", "s1", "second")
	})
	moved := filepath.Join(t.TempDir(), "moved")
	copyWithTimes(t, moved, cfg.DataDir)
	cfg.DataDir = moved
	run(func(s *embed.Server) {
		restore(t, s, "", "s0", "third")
		restore(t, s, "", "s1", "fourth")
	})
}

// TestObjectDirectoryInUse starts a second embedded server on the object directory
// of the first.
func TestObjectDirectoryInUse(t *testing.T) {
	first, second := small(t), small(t)
	start(t, first)
	objects := filepath.Join(first.DataDir, "objects")
	second.ObjectStores = map[string]embed.ObjectStore{"default": {Path: objects}}
	s, err := embed.Start(t.Context(), second)
	if err == nil {
		err = errors.Join(errors.New("the server started"), s.Close())
	}
	if !errors.Is(err, embed.ErrInUse) || !strings.Contains(err.Error(), objects) {
		t.Errorf("got %v", err)
	}
}

// putFile writes the file of the collection c.
func putFile(t *testing.T, dir string) object.Info {
	t.Helper()
	store, err := file.Open(dir, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	info, err := store.Put(t.Context(), "c/data", []byte("rows"))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	return info
}

// register registers a segment of the file c/data.
func register(t *testing.T, s *embed.Server, collection string, size int64, etag string) {
	t.Helper()
	ctx, catalog := t.Context(), pb.NewCatalogServiceClient(s.Conn())
	ref := &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: collection}}}
	ids, err := catalog.AllocateIds(ctx, &pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: 1}})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := catalog.AddSegments(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.AddSegmentsRequest{Collection: ref, Segments: []*pb.Segment{{
		Id: ids.GetIds().GetFirst(), State: pb.Segment_STATE_FLUSHED, Rows: 1,
		StartPosition: &pb.Position{Timestamp: 1}, DmlPosition: &pb.Position{Timestamp: 2},
		Files: []*pb.File{{
			Path: "data", Kind: "insert", SizeBytes: size, Etag: etag, Entries: 1, MinTimestamp: 1,
			MaxTimestamp: 1,
		}},
	}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.SetCheckpoints(ctx, &pb.SetCheckpointsRequest{
		Collection: ref, Checkpoints: []*pb.ChannelPosition{{Position: &pb.Position{Timestamp: 10}}},
	}); err != nil {
		t.Fatal(err)
	}
}

// restore restores a snapshot and waits for the end. With a collection it creates the
// snapshot first.
func restore(t *testing.T, s *embed.Server, collection, snapshot, target string) {
	t.Helper()
	ctx, snapshots := t.Context(), pb.NewSnapshotServiceClient(s.Conn())
	if collection != "" {
		if _, err := snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
			Name: snapshot, Verify: true,
			Collection: &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: collection}}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	job, err := snapshots.RestoreSnapshot(ctx, &pb.RestoreSnapshotRequest{
		Snapshot: &pb.SnapshotRef{Ref: &pb.SnapshotRef_Name{Name: snapshot}}, Target: &pb.CollectionName{Name: target},
	})
	if err != nil {
		t.Fatalf("restore %s to %s: %v", snapshot, target, err)
	}
	stream, err := snapshots.WatchRestore(ctx, &pb.WatchRestoreRequest{JobId: job.GetJobId()})
	if err != nil {
		t.Fatal(err)
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatalf("restore %s to %s: %v", snapshot, target, err)
		}
		state := resp.GetJob().GetState()
		if state == pb.RestoreJob_STATE_COMPLETED {
			return
		}
		if state == pb.RestoreJob_STATE_FAILED || state == pb.RestoreJob_STATE_CANCELED {
			t.Fatalf("restore %s to %s ended as %v: %v", snapshot, target, state, resp.GetJob())
		}
	}
}

// copyWithTimes copies a directory as cp -a does: other inodes, the same times.
func copyWithTimes(t *testing.T, to, from string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(from, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return os.Chtimes(filepath.Join(to, strings.TrimPrefix(name, from)), time.Time{}, info.ModTime())
	}); err != nil {
		t.Fatal(err)
	}
}
