//go:build !short

package embed_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/embed"
)

// TestMetadataRollback starts the server on a copy of etcd's directory that is older
// than the object store: it starts, logs that, and allocates no id.
func TestMetadataRollback(t *testing.T) {
	cfg := small(t)
	etcd, backup := filepath.Join(cfg.DataDir, "etcd"), filepath.Join(t.TempDir(), "etcd")
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
	allocate := func(s *embed.Server) error {
		_, err := pb.NewCatalogServiceClient(s.Conn()).AllocateIds(t.Context(), &pb.AllocateIdsRequest{
			Want: &pb.AllocateIdsRequest_Count{Count: 1_000_000},
		})
		return err
	}
	allocateTwice := func(s *embed.Server) {
		t.Helper()
		for range 2 { // a million each: the second exceeds the first idLimit
			if err := allocate(s); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(allocateTwice)
	if err := os.CopyFS(backup, os.DirFS(etcd)); err != nil {
		t.Fatal(err)
	}
	run(allocateTwice)
	run(allocateTwice)
	if err := os.RemoveAll(etcd); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(etcd, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.ErrorLevel)
	cfg.Log = zap.New(core)
	run(func(s *embed.Server) {
		err := allocate(s)
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "snapshotctl recover") {
			t.Errorf("allocate: %v", err)
		}
		if logs.FilterMessageSnippet("snapshotctl recover").Len() == 0 {
			t.Errorf("nothing about it in the log: %v", logs.All())
		}
	})
}
