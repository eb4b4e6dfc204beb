package server

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"unicode/utf8"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog/inspect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
)

// admin implements the AdminService.
type admin struct {
	pb.UnimplementedAdminServiceServer
	manager       *manager.Manager
	cluster       cluster.Cluster
	kv            meta.KV
	tokens        pageTokenCodec
	version       string
	replica       string
	stores        []string
	snapshotStore string
}

func (s *admin) GetServerInfo(ctx context.Context, _ *pb.GetServerInfoRequest) (*pb.GetServerInfoResponse, error) {
	leader, err := election.Leader(ctx, s.kv, keys.Leader)
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
	const method = "GetKey"
	kv, err := s.record(ctx, req)
	if err != nil {
		return nil, err
	}
	var revision, offset int64
	if token := req.GetPageToken(); token != "" {
		if !s.tokens.open(token, method, filterHash(req), &revision, &offset) {
			return nil, errPageToken
		}
		// All pages are of the same revision of the record.
		old, err := s.kv.Range(ctx, meta.Range{From: kv.Key, Revision: revision})
		if err != nil {
			return nil, fmt.Errorf("read %s at revision %d: %w", kv.Key, revision, err)
		}
		if len(old.KVs) == 0 {
			return nil, fmt.Errorf("%w: %s", errKeyNotFound, req.GetKey())
		}
		kv = old.KVs[0]
	}
	kind, text := inspect.Describe(kv)
	if offset < 0 || offset > int64(len(text)) {
		return nil, errPageToken
	}
	resp := &pb.GetKeyResponse{
		Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Leased: kv.Lease != 0, Type: kind,
	}
	resp.Json = truncateText(text[offset:], maxAnswerBytes)
	if end := offset + int64(len(resp.GetJson())); end < int64(len(text)) {
		resp.NextPageToken = s.tokens.seal(method, filterHash(req), kv.ModRevision, end)
	}
	return resp, nil
}

// truncateText returns the longest prefix of text of at most limit bytes that ends with
// a whole rune.
func truncateText(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	return text[:limit]
}

// record returns the record under the requested key, whose ids may lack leading zeros.
func (s *admin) record(ctx context.Context, req *pb.GetKeyRequest) (meta.KeyValue, error) {
	for _, key := range []string{req.GetKey(), zeroPadIDs(req.GetKey())} {
		if len(key) > meta.MaxKeyBytes {
			continue
		}
		kv, found, _, err := s.kv.Get(ctx, key)
		if err != nil {
			return meta.KeyValue{}, fmt.Errorf("read %s: %w", key, err)
		}
		if found {
			return kv, nil
		}
	}
	return meta.KeyValue{}, fmt.Errorf("%w: %s", errKeyNotFound, req.GetKey())
}

// zeroPadIDs returns a key with its ids padded to the stored number of digits.
func zeroPadIDs(key string) string {
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
		resp.Checks = append(resp.Checks, &pb.ProbeCheck{
			Name: c.Name, Required: c.Required, Ok: c.OK, Detail: clip(c.Detail), NotKnown: c.Err != nil,
		})
	}
	return resp, nil
}
