package server_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// TestPins pins, renews and removes, and refuses the drop of a pinned snapshot.
func TestPins(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	e.collection(t, "c")
	snap := e.snapshot(t, "s")
	req := &pb.PinSnapshotRequest{
		Snapshot: snapNamed("s"), Owner: "backup-job", Reason: "nightly export",
		Ttl: durationpb.New(90500 * time.Millisecond), RequestToken: "t-1",
	}
	pin := must[*pb.PinSnapshotResponse](t)(e.snapshots.PinSnapshot(ctx, req)).GetPin()
	requireAllSet(t, pin)
	if pin.GetSnapshotId() != snap.GetId() || pin.GetOwner() != "backup-job" || pin.GetReason() != "nightly export" ||
		pin.GetTtl().AsDuration() != 91*time.Second ||
		pin.GetExpireTime().AsTime().Sub(pin.GetCreateTime().AsTime()) != 91*time.Second {
		t.Errorf("got %v", pin)
	}
	again := must[*pb.PinSnapshotResponse](t)(e.snapshots.PinSnapshot(ctx, req)).GetPin()
	if diff := cmp.Diff(pin, again, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	reused := proto.CloneOf(req)
	reused.Owner = "another"
	if _, err := e.snapshots.PinSnapshot(ctx, reused); reason(err) != "REQUEST_TOKEN_REUSED" {
		t.Errorf("got %v", err)
	}
	key := must[*pb.GetKeyResponse](t)(e.admin.GetKey(ctx,
		&pb.GetKeyRequest{Key: fmt.Sprintf("/snapshot/pin/%d/%d", snap.GetId(), pin.GetId())}))
	if !key.GetLeased() {
		t.Errorf("got %v", key)
	}
	_, err := e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")})
	if reason(err) != "SNAPSHOT_PINNED" || status.Code(err) != codes.FailedPrecondition ||
		!strings.Contains(err.Error(), fmt.Sprintf("pinned by %d (backup-job: nightly export until 2", pin.GetId())) {
		t.Errorf("got %v", err)
	}
	renewed := must[*pb.RenewPinResponse](t)(e.snapshots.RenewPin(ctx,
		&pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId(), Ttl: durationpb.New(time.Hour)})).GetPin()
	want := proto.CloneOf(pin)
	want.Ttl, want.ExpireTime = durationpb.New(time.Hour), renewed.GetExpireTime()
	if diff := cmp.Diff(want, renewed, protocmp.Transform()); diff != "" ||
		!renewed.GetExpireTime().AsTime().After(pin.GetExpireTime().AsTime()) {
		t.Error(renewed, diff)
	}
	list := must[*pb.ListPinsResponse](t)(e.snapshots.ListPins(ctx, &pb.ListPinsRequest{Snapshot: snapID(snap.GetId())}))
	if diff := cmp.Diff([]*pb.Pin{renewed}, list.GetPins(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	unlimited := e.pin(t, "s", 0)
	if unlimited.GetTtl() != nil || unlimited.GetExpireTime() != nil {
		t.Errorf("got %v", unlimited)
	}
	_, err = e.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: unlimited.GetId()})
	if reason(err) != "PIN_HAS_NO_TTL" || status.Code(err) != codes.FailedPrecondition {
		t.Errorf("got %v", err)
	}
	for _, id := range []int64{pin.GetId(), pin.GetId(), unlimited.GetId()} { // a repeated removal succeeds
		must[*pb.UnpinSnapshotResponse](t)(e.snapshots.UnpinSnapshot(ctx,
			&pb.UnpinSnapshotRequest{Snapshot: snapNamed("s"), PinId: id}))
	}
	_, err = e.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId()})
	if reason(err) != "PIN_NOT_FOUND" || status.Code(err) != codes.NotFound ||
		!strings.Contains(err.Error(), "pin it again") {
		t.Errorf("got %v", err)
	}
	must[*pb.DropSnapshotResponse](t)(e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")}))
	must[*pb.UnpinSnapshotResponse](t)(e.snapshots.UnpinSnapshot(ctx,
		&pb.UnpinSnapshotRequest{Snapshot: snapNamed("s"), PinId: pin.GetId()}))
	_, err = e.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId()})
	if reason(err) != "PIN_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
	if _, err = e.snapshots.ListPins(ctx,
		&pb.ListPinsRequest{Snapshot: snapNamed("s")}); reason(err) != "SNAPSHOT_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
	if _, err = e.snapshots.PinSnapshot(ctx,
		&pb.PinSnapshotRequest{Snapshot: snapNamed("s"), Owner: "o"}); reason(err) != "SNAPSHOT_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
}

// TestPinPages lists the pins of one and of all snapshots.
func TestPinPages(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	e.collection(t, "c")
	for _, name := range []string{"s", "r"} {
		e.snapshot(t, name)
	}
	var all, ofS []*pb.Pin
	for range 5 {
		p := e.pin(t, "s", time.Hour)
		all, ofS = append(all, p), append(ofS, p)
	}
	for range 5 {
		all = append(all, e.pin(t, "r", 0))
	}
	var token string
	for _, tc := range []struct {
		of   *pb.SnapshotRef
		want []*pb.Pin
	}{{nil, all}, {snapNamed("s"), ofS}} {
		var got []*pb.Pin
		req := &pb.ListPinsRequest{Snapshot: tc.of, PageSize: 2}
		for {
			page := must[*pb.ListPinsResponse](t)(e.snapshots.ListPins(ctx, req))
			if got = append(got, page.GetPins()...); len(page.GetPins()) > 2 {
				t.Errorf("a page of %d", len(page.GetPins()))
			}
			if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
				break
			}
			token = req.GetPageToken()
		}
		if diff := cmp.Diff(tc.want, got, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	}
	for _, bad := range []*pb.ListPinsRequest{
		{PageToken: token},
		{Snapshot: snapNamed("r"), PageToken: token},
		{Snapshot: snapNamed("s"), PageToken: token + "A"},
		{PageToken: "x"},
	} {
		if _, err := e.snapshots.ListPins(ctx, bad); reason(err) != "INVALID_PAGE_TOKEN" ||
			status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: got %v", bad, err)
		}
	}
}

// TestBadPins sends invalid calls about pins. Each is refused and writes nothing.
func TestBadPins(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	e.collection(t, "c")
	e.snapshot(t, "s")
	e.snapshot(t, "other")
	e.snapshot(t, "deleting")
	pin := e.pin(t, "s", time.Hour)
	e.objects.Freeze()
	defer e.objects.Thaw()
	must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(ctx,
		&pb.CreateSnapshotRequest{Collection: byName("c"), Name: "pending", Wait: new(false)}))
	deleting := must[*pb.DropSnapshotResponse](t)(e.snapshots.DropSnapshot(ctx,
		&pb.DropSnapshotRequest{Snapshot: snapNamed("deleting")})).GetSnapshotId()
	type call struct {
		name   string
		send   func() error
		code   codes.Code
		reason string
		field  string
	}
	create := func(name, reason, field string, code codes.Code, edit func(*pb.PinSnapshotRequest)) call {
		return call{name, func() error {
			req := &pb.PinSnapshotRequest{Snapshot: snapNamed("s"), Owner: "o"}
			edit(req)
			_, err := e.snapshots.PinSnapshot(ctx, req)
			return err
		}, code, reason, field}
	}
	renew := func(name, reason, field string, code codes.Code, req *pb.RenewPinRequest) call {
		return call{name, func() error { _, err := e.snapshots.RenewPin(ctx, req); return err }, code, reason, field}
	}
	const invalid, precondition = codes.InvalidArgument, codes.FailedPrecondition
	calls := []call{
		create("no snapshot", "INVALID_REQUEST", "snapshot", invalid, func(r *pb.PinSnapshotRequest) { r.Snapshot = nil }),
		create("no owner", "INVALID_REQUEST", "owner", invalid, func(r *pb.PinSnapshotRequest) { r.Owner = "" }),
		create("long owner", "INVALID_REQUEST", "owner", invalid,
			func(r *pb.PinSnapshotRequest) { r.Owner = strings.Repeat("é", 128) }),
		create("long reason", "INVALID_REQUEST", "reason", invalid,
			func(r *pb.PinSnapshotRequest) { r.Reason = strings.Repeat("r", 257) }),
		create("token with space", "INVALID_REQUEST", "request_token", invalid,
			func(r *pb.PinSnapshotRequest) { r.RequestToken = "a b" }),
		create("unknown", "SNAPSHOT_NOT_FOUND", "", codes.NotFound,
			func(r *pb.PinSnapshotRequest) { r.Snapshot = snapNamed("none") }),
		create("never there", "NEVER_EXISTED", "", codes.NotFound,
			func(r *pb.PinSnapshotRequest) { r.Snapshot = snapID(1 << 60) }),
		create("PENDING", "SNAPSHOT_NOT_COMMITTED", "", precondition,
			func(r *pb.PinSnapshotRequest) { r.Snapshot = snapNamed("pending") }),
		create("DELETING", "SNAPSHOT_NOT_COMMITTED", "", precondition,
			func(r *pb.PinSnapshotRequest) { r.Snapshot = snapID(deleting) }),
		renew("renew no pin", "INVALID_REQUEST", "pin_id", invalid, &pb.RenewPinRequest{Snapshot: snapNamed("s")}),
		renew("renew a negative pin", "INVALID_REQUEST", "pin_id", invalid,
			&pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: -1}),
		renew("renew an unknown pin", "PIN_NOT_FOUND", "", codes.NotFound,
			&pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId() + 1}),
		renew("renew a pin of another snapshot", "PIN_NOT_FOUND", "", codes.NotFound,
			&pb.RenewPinRequest{Snapshot: snapNamed("other"), PinId: pin.GetId()}),
		renew("renew of no snapshot", "PIN_NOT_FOUND", "", codes.NotFound,
			&pb.RenewPinRequest{Snapshot: snapNamed("none"), PinId: pin.GetId()}),
		{"remove no pin", func() error {
			_, err := e.snapshots.UnpinSnapshot(ctx, &pb.UnpinSnapshotRequest{Snapshot: snapNamed("s")})
			return err
		}, invalid, "INVALID_REQUEST", "pin_id"},
		{"remove without a snapshot", func() error {
			_, err := e.snapshots.UnpinSnapshot(ctx, &pb.UnpinSnapshotRequest{PinId: 5})
			return err
		}, invalid, "INVALID_REQUEST", "snapshot"},
		{"a negative page", func() error {
			_, err := e.snapshots.ListPins(ctx, &pb.ListPinsRequest{PageSize: -1})
			return err
		}, invalid, "INVALID_REQUEST", "page_size"},
		{"an empty reference", func() error {
			_, err := e.snapshots.ListPins(ctx, &pb.ListPinsRequest{Snapshot: &pb.SnapshotRef{}})
			return err
		}, invalid, "INVALID_REQUEST", "snapshot.ref"},
	}
	for _, ttl := range []*durationpb.Duration{
		{},
		{Nanos: 500_000_000},
		{Seconds: -1},
		{Seconds: 31 * 24 * 3600},
		{Seconds: 30 * 24 * 3600, Nanos: 1},
		{Seconds: 1<<63 - 1},
		{Seconds: -1 << 63},
		{Seconds: 1, Nanos: -1},
		{Seconds: 1, Nanos: -1 << 31},
	} {
		calls = append(calls,
			create(fmt.Sprint("ttl ", ttl), "INVALID_REQUEST", "ttl", invalid, func(r *pb.PinSnapshotRequest) { r.Ttl = ttl }),
			renew(fmt.Sprint("new ttl ", ttl), "INVALID_REQUEST", "ttl", invalid,
				&pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId(), Ttl: ttl}))
	}
	for _, c := range calls {
		t.Run(c.name, func(t *testing.T) {
			before := e.revision(t)
			err := c.send()
			if status.Code(err) != c.code || reason(err) != c.reason {
				t.Errorf("got %v (%s), want %v %s", err, reason(err), c.code, c.reason)
			}
			if got := fields(err); c.field != "" && (len(got) == 0 || got[0] != c.field) {
				t.Errorf("fields %q of %v, want %q", got, err, c.field)
			}
			if after := e.revision(t); after != before {
				t.Errorf("written: revision %d, before %d", after, before)
			}
		})
	}
	// The removal of a pin that does not exist succeeds.
	for _, req := range []*pb.UnpinSnapshotRequest{
		{Snapshot: snapNamed("none"), PinId: 5},
		{Snapshot: snapID(1 << 60), PinId: 5},
		{Snapshot: snapID(deleting), PinId: 5},
		{Snapshot: snapNamed("other"), PinId: pin.GetId()},
	} {
		must[*pb.UnpinSnapshotResponse](t)(e.snapshots.UnpinSnapshot(ctx, req))
	}
	if left := must[*pb.ListPinsResponse](t)(e.snapshots.ListPins(ctx,
		&pb.ListPinsRequest{})).GetPins(); len(left) != 1 {
		t.Errorf("left %v", left)
	}
}
