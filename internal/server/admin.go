package server

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog/inspect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// admin is the AdminService.
type admin struct {
	pb.UnimplementedAdminServiceServer
	manager       *manager.Manager
	cluster       cluster.Cluster
	kv            meta.KV
	version       string
	replica       string
	stores        []string
	snapshotStore string
}

func (s *admin) GetServerInfo(ctx context.Context, _ *pb.GetServerInfoRequest) (*pb.GetServerInfoResponse, error) {
	leader, err := s.manager.Leader(ctx)
	if err != nil {
		return nil, err
	}
	scope := pb.GetServerInfoResponse_NAME_SCOPE_CLUSTER
	if s.cluster.NameScope == cluster.ScopeCollection {
		scope = pb.GetServerInfoResponse_NAME_SCOPE_COLLECTION
	}
	return &pb.GetServerInfoResponse{
		Version: s.version, ClusterId: s.cluster.ID, NameScope: scope, Leader: leader, Replica: s.replica,
		Stores: s.stores, SnapshotStore: s.snapshotStore,
	}, nil
}

func (s *admin) GetKey(ctx context.Context, req *pb.GetKeyRequest) (*pb.GetKeyResponse, error) {
	for _, key := range []string{req.GetKey(), padded(req.GetKey())} {
		if len(key) > meta.MaxKeyBytes {
			continue
		}
		kv, found, _, err := s.kv.Get(ctx, key)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", key, err)
		}
		if !found {
			continue
		}
		kind, text := inspect.Describe(kv)
		return &pb.GetKeyResponse{
			Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Leased: kv.Lease != 0,
			Type: kind, Json: text,
		}, nil
	}
	return nil, fmt.Errorf("%w: %s", errKeyNotFound, req.GetKey())
}

// padded writes the numbers in a key as they are stored.
func padded(key string) string {
	const digits = 19
	parts := strings.Split(key, "/")
	for i, p := range parts {
		if p != "" && len(p) < digits && strings.Trim(p, "0123456789") == "" {
			parts[i] = strings.Repeat("0", digits-len(p)) + p
		}
	}
	return strings.Join(parts, "/")
}

func (s *admin) ProbeStore(ctx context.Context, req *pb.ProbeStoreRequest) (*pb.ProbeStoreResponse, error) {
	report, err := s.manager.ProbeStore(ctx, req.GetStore())
	if err != nil {
		return nil, err
	}
	resp := &pb.ProbeStoreResponse{Store: cmp.Or(req.GetStore(), s.snapshotStore), Usable: report.Err() == nil}
	for _, c := range report.Checks {
		resp.Checks = append(resp.Checks, &pb.ProbeCheck{Name: c.Name, Required: c.Required, Ok: c.OK, Detail: c.Detail, NotKnown: c.Err != nil})
	}
	return resp, nil
}
