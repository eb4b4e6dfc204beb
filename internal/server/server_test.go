package server_test

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// TestPanic has a handler panic: the call fails, the server continues.
func TestPanic(t *testing.T) {
	e := newEnv(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-request-id", "req-1")
	_, err := e.admin.GetKey(ctx, &pb.GetKeyRequest{Key: panicKey})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "req-1") ||
		strings.Contains(err.Error(), "handler error") {
		t.Errorf("got %v", err)
	}
	logged := e.logs.FilterMessage("panic").All()
	if len(logged) != 1 || !strings.Contains(fmt.Sprint(logged[0].ContextMap()["stack"]), "GetKey") {
		t.Errorf("logged %v", logged)
	}
	must[*pb.GetServerInfoResponse](t)(e.admin.GetServerInfo(t.Context(), &pb.GetServerInfoRequest{}))
}

// TestRequestIDs uses valid request ids of callers, and makes one otherwise.
func TestRequestIDs(t *testing.T) {
	e := newEnv(t)
	for id, want := range map[string]string{
		"abc-1.2_3":             "^abc-1\\.2_3$",
		"":                      "^[A-Z0-9]{26}$",
		"a b":                   "^[A-Z0-9]{26}$",
		strings.Repeat("a", 65): "^[A-Z0-9]{26}$",
	} {
		ctx := t.Context()
		if id != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "x-request-id", id)
		}
		var header metadata.MD
		must[*pb.GetServerInfoResponse](t)(e.admin.GetServerInfo(ctx, &pb.GetServerInfoRequest{}, grpc.Header(&header)))
		got := header.Get("x-request-id")
		if len(got) != 1 || !regexp.MustCompile(want).MatchString(got[0]) {
			t.Errorf("%q: got %q", id, got)
			continue
		}
		if n := e.logs.FilterMessage("call").FilterField(zap.String("request_id", got[0])).Len(); n != 1 {
			t.Errorf("%q: %d lines", got, n)
		}
	}
}

// TestLogHoldsNoPayload logs methods and reasons, and no content of requests.
func TestLogHoldsNoPayload(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	col := e.collection(t, "col-canary")
	e.addSegments(t, byID(col.GetId()))
	_, _ = e.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed("canary-name")})
	_, _ = e.catalog.UpdateCollection(ctx, &pb.UpdateCollectionRequest{
		Collection: byID(col.GetId()), Properties: map[string]string{"k": "canary-value"}, RequestToken: "canary-token",
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"properties"}},
	})
	for _, e := range e.logs.All() {
		if line := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(line, "canary") {
			t.Error(line)
		}
	}
	found := e.logs.FilterMessage("call").FilterField(zap.String("reason", "SNAPSHOT_NOT_FOUND")).All()
	if len(found) != 1 {
		t.Fatalf("%d lines", len(found))
	}
	f := found[0].ContextMap()
	if f["method"] != pb.SnapshotService_GetSnapshot_FullMethodName || f["code"] != "NotFound" ||
		f["principal"] != "local" || f["duration"] == nil {
		t.Errorf("got %v", f)
	}
}

// TestStoreUnavailable hides the address of a store from the client and logs it.
func TestStoreUnavailable(t *testing.T) {
	e := newEnv(t)
	e.collection(t, "c")
	e.kv.down.Store(true)
	_, err := e.catalog.GetCollection(t.Context(), &pb.GetCollectionRequest{Collection: byName("c")})
	if status.Code(err) != codes.Unavailable || reason(err) != "STORE_UNAVAILABLE" ||
		strings.Contains(err.Error(), "10.9.8.7") {
		t.Errorf("got %v", err)
	}
	lines := e.logs.FilterMessage("call").FilterField(zap.String("reason", "STORE_UNAVAILABLE")).All()
	if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["err"]), "10.9.8.7") {
		t.Errorf("logged %v", lines)
	}
	e.kv.down.Store(false)
}

// TestServerInfo reads the information about the server.
func TestServerInfo(t *testing.T) {
	e := newEnv(t)
	info := must[*pb.GetServerInfoResponse](t)(e.admin.GetServerInfo(t.Context(), &pb.GetServerInfoRequest{}))
	info.Leader = "" // the election may be running
	want := &pb.GetServerInfoResponse{
		Version: "v1", ClusterId: info.GetClusterId(), NameScope: pb.GetServerInfoResponse_NAME_SCOPE_CLUSTER,
		Replica: "r1", Stores: []string{"default"}, SnapshotStore: "default",
	}
	if diff := cmp.Diff(want, info, protocmp.Transform()); diff != "" || info.GetClusterId() == "" {
		t.Error(diff)
	}
	key := must[*pb.GetKeyResponse](t)(e.admin.GetKey(t.Context(), &pb.GetKeyRequest{Key: "/format"}))
	if !strings.Contains(key.GetJson(), info.GetClusterId()) || strings.Contains(key.GetJson(), "token") {
		t.Errorf("got %v", key)
	}
}

// TestHealthAndStop has Stop end a watch before its context ends.
func TestHealthAndStop(t *testing.T) {
	e := newEnv(t)
	check := func() (*healthpb.HealthCheckResponse, error) {
		return healthpb.NewHealthClient(e.conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	}
	if got := must[*healthpb.HealthCheckResponse](t)(check()); got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("got %v", got)
	}
	watch, err := e.events.WatchEvents(t.Context(), &pb.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	must[*pb.WatchEventsResponse](t)(watch.Recv())
	// A watch has no end of its own; Stop ends it.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e.server.Stop(ctx)
	if ctx.Err() != nil {
		t.Error("the watch delayed the stop")
	}
	for err == nil {
		_, err = watch.Recv()
	}
	if status.Code(err) != codes.Unavailable || reason(err) != "STOPPING" {
		t.Errorf("got %v", err)
	}
}

// TestMetrics counts calls by method and code.
func TestMetrics(t *testing.T) {
	e := newEnv(t)
	e.collection(t, "c")
	families, err := e.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "grpc_server_handled_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["grpc_method"] == "CreateCollection" && labels["grpc_code"] == "OK" && m.GetCounter().GetValue() == 1 {
				return
			}
		}
	}
	t.Error("the call was not counted")
}
