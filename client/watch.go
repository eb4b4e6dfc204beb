package client

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// WatchEvents calls fn with each message of the event stream that req asks for,
// bookmarks included, one at a time and in order. A stream that ends, or whose
// server becomes unavailable, is reopened after a pause, after the last message that
// fn accepted: fn gets each message exactly once.
//
// It always returns an error: fn's own, unchanged; that of ctx at its end; or the
// server's, if a retry does not help. EVENTS_COMPACTED is one of these: the caller
// then lists the records and watches without a token.
//
// To continue in another process, store the resume_token of the last processed
// message. WatchEvents does not change req.
func WatchEvents(
	ctx context.Context, events snapshotdv1.EventServiceClient, req *snapshotdv1.WatchEventsRequest,
	fn func(*snapshotdv1.WatchEventsResponse) error,
) error {
	req = proto.CloneOf(req)
	for failures := 0; ; {
		received, wait, err := watch(ctx, events, req, fn)
		if err != nil {
			return err
		}
		if received {
			failures = 0
		}
		failures++
		if err := sleep(ctx, max(pause(failures), wait)); err != nil {
			return err
		}
	}
}

// watch follows one stream and keeps the resume token in req. Without an error the
// caller reopens the stream, after wait at the earliest; received reports whether
// the stream had a message.
func watch(
	ctx context.Context, events snapshotdv1.EventServiceClient, req *snapshotdv1.WatchEventsRequest,
	fn func(*snapshotdv1.WatchEventsResponse) error,
) (received bool, wait time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx) // frees the stream when fn ends it
	defer cancel()
	stream, err := events.WatchEvents(ctx, req)
	if err != nil {
		wait, err = reopenable(ctx, err)
		return false, wait, err
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			wait, err = reopenable(ctx, err)
			return received, wait, err
		}
		if err := fn(msg); err != nil {
			return received, 0, err
		}
		received = true
		req.ResumeToken = msg.GetResumeToken()
	}
}

// reopenable returns no error, and the server's retry delay, if the stream can be
// reopened after err; otherwise it returns the error of the watch.
func reopenable(ctx context.Context, err error) (wait time.Duration, _ error) {
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case errors.Is(err, io.EOF):
		return 0, nil
	}
	switch status.Code(err) {
	case codes.Unavailable,
		// The server or gRPC may report the deadline before ctx ends.
		codes.Canceled, codes.DeadlineExceeded:
		return retryDelay(err), nil
	default:
		return 0, err
	}
}

// WatchRestore calls fn with a restore job after each change, including its end. A
// stream that ends before, or whose server becomes unavailable, is reopened after a
// pause. WatchRestore returns fn's error unchanged, that of ctx at its end, or the
// server's if a retry does not help.
func WatchRestore(
	ctx context.Context, snapshots snapshotdv1.SnapshotServiceClient, job int64, fn func(*snapshotdv1.RestoreJob) error,
) error {
	for failures := 0; ; {
		ended, received, wait, err := watchRestore(ctx, snapshots, job, fn)
		if err != nil || ended {
			return err
		}
		if received {
			failures = 0
		}
		failures++
		if err := sleep(ctx, max(pause(failures), wait)); err != nil {
			return err
		}
	}
}

// WaitRestore waits for the end of a restore job, and returns the job in its final
// state.
func WaitRestore(
	ctx context.Context, snapshots snapshotdv1.SnapshotServiceClient, job int64,
) (*snapshotdv1.RestoreJob, error) {
	var last *snapshotdv1.RestoreJob
	err := WatchRestore(ctx, snapshots, job, func(j *snapshotdv1.RestoreJob) error {
		last = j
		return nil
	})
	return last, err
}

// RestoreEnded reports whether a job is in a final state.
func RestoreEnded(job *snapshotdv1.RestoreJob) bool {
	switch job.GetState() {
	case snapshotdv1.RestoreJob_STATE_COMPLETED, snapshotdv1.RestoreJob_STATE_FAILED,
		snapshotdv1.RestoreJob_STATE_CANCELED:
		return true
	case snapshotdv1.RestoreJob_STATE_UNSPECIFIED, snapshotdv1.RestoreJob_STATE_PENDING,
		snapshotdv1.RestoreJob_STATE_EXECUTING:
	}
	return false
}

// watchRestore follows one stream.
func watchRestore(
	ctx context.Context, snapshots snapshotdv1.SnapshotServiceClient, job int64, fn func(*snapshotdv1.RestoreJob) error,
) (ended, received bool, wait time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx) // frees the stream when fn ends it
	defer cancel()
	stream, err := snapshots.WatchRestore(ctx, &snapshotdv1.WatchRestoreRequest{JobId: job})
	if err != nil {
		wait, err = reopenable(ctx, err)
		return false, false, wait, err
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			wait, err = reopenable(ctx, err)
			return false, received, wait, err
		}
		received = true
		if err := fn(msg.GetJob()); err != nil {
			return false, true, 0, err
		}
		if RestoreEnded(msg.GetJob()) {
			return true, true, 0, nil
		}
	}
}
