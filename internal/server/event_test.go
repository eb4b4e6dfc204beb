package server_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// TestEvents watches, resumes, and refuses invalid and compacted tokens.
func TestEvents(t *testing.T) {
	e := newEnv(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := e.events.WatchEvents(ctx, &pb.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	recv := func() *pb.WatchEventsResponse {
		t.Helper()
		for {
			msg := must[*pb.WatchEventsResponse](t)(stream.Recv())
			if msg.GetBookmark() == nil {
				return msg
			}
		}
	}
	mark := must[*pb.WatchEventsResponse](t)(stream.Recv())
	if mark.GetBookmark() == nil || mark.GetResumeToken() == "" || mark.GetRevision() == 0 {
		t.Fatalf("got %v, want a bookmark", mark)
	}
	col := e.collection(t, "c")
	must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(ctx,
		&pb.CreateSnapshotRequest{Collection: byName("c"), Name: "s"}))
	describe := func(m *pb.WatchEventsResponse) string {
		if c := m.GetCollection(); c != nil {
			return fmt.Sprint("collection ", c.GetType(), c.GetCollection().GetState())
		}
		return fmt.Sprint("snapshot ", m.GetSnapshot().GetType(), m.GetSnapshot().GetSnapshot().GetState())
	}
	var got, tokens []string
	for range 3 {
		m := recv()
		got, tokens = append(got, describe(m)), append(tokens, m.GetResumeToken())
	}
	want := []string{
		"collection CHANGE_TYPE_CREATED STATE_ACTIVE",
		"snapshot CHANGE_TYPE_CREATED STATE_PENDING",
		"snapshot CHANGE_TYPE_UPDATED STATE_COMMITTED",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// A stream resumed after a message continues with the next.
	for i, token := range append([]string{mark.GetResumeToken()}, tokens[:2]...) {
		stream, err = e.events.WatchEvents(ctx, &pb.WatchEventsRequest{ResumeToken: token})
		if err != nil {
			t.Fatal(err)
		}
		if m := describe(recv()); m != want[i] {
			t.Errorf("resumed at %d: got %s, want %s", i, m, want[i])
		}
	}
	for _, req := range []*pb.WatchEventsRequest{
		{ResumeToken: "x"}, {ResumeToken: tokens[0], Collection: byID(col.GetId())}, {ResumeToken: tokens[0] + "A"},
	} {
		stream, err := e.events.WatchEvents(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); reason(err) != "INVALID_RESUME_TOKEN" {
			t.Errorf("%v: got %v", req, err)
		}
	}
	if err := e.kv.Compact(ctx, col.GetRevision()+1); err != nil {
		t.Fatal(err)
	}
	stream, err = e.events.WatchEvents(ctx, &pb.WatchEventsRequest{ResumeToken: mark.GetResumeToken()})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if reason(err) != "EVENTS_COMPACTED" || status.Code(err) != codes.OutOfRange {
		t.Errorf("got %v", err)
	}
}

// TestPinEvents watches the events of pins, resumed after each.
func TestPinEvents(t *testing.T) {
	e := newEnv(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e.collection(t, "c")
	e.collection(t, "other")
	e.snapshot(t, "s")
	stream, err := e.events.WatchEvents(ctx, &pb.WatchEventsRequest{Collection: byName("other")})
	if err != nil {
		t.Fatal(err)
	}
	mark := must[*pb.WatchEventsResponse](t)(stream.Recv())
	removed, expires := e.pin(t, "s", time.Hour), e.pin(t, "s", time.Second)
	must[*pb.UnpinSnapshotResponse](t)(e.snapshots.UnpinSnapshot(ctx,
		&pb.UnpinSnapshotRequest{Snapshot: snapNamed("s"), PinId: removed.GetId()}))
	ids := func(p *pb.Pin) *pb.Pin { return &pb.Pin{Id: p.GetId(), SnapshotId: p.GetSnapshotId()} }
	want := []*pb.PinEvent{
		{Type: pb.ChangeType_CHANGE_TYPE_CREATED, Pin: removed},
		{Type: pb.ChangeType_CHANGE_TYPE_CREATED, Pin: expires},
		{Type: pb.ChangeType_CHANGE_TYPE_DELETED, Pin: ids(removed)},
		{Type: pb.ChangeType_CHANGE_TYPE_DELETED, Pin: ids(expires), Expired: true},
	}
	token := mark.GetResumeToken()
	for i, next := range want {
		// A stream resumed after a message continues with the next.
		stream, err := e.events.WatchEvents(ctx, &pb.WatchEventsRequest{Collection: byName("other"), ResumeToken: token})
		if err != nil {
			t.Fatal(err)
		}
		m := must[*pb.WatchEventsResponse](t)(stream.Recv())
		for m.GetBookmark() != nil {
			m = must[*pb.WatchEventsResponse](t)(stream.Recv())
		}
		if diff := cmp.Diff(next, m.GetPin(), protocmp.Transform()); diff != "" {
			t.Errorf("event %d: %s", i, diff)
		}
		token = m.GetResumeToken()
	}
	must[*pb.DropSnapshotResponse](t)(e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")}))
}
