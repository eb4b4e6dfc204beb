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
// server becomes unavailable, is opened again after a pause, behind the last
// message that fn took, so that fn misses nothing and sees nothing twice.
//
// It returns only with an error: fn's own, as it is; that of ctx when it ends;
// or the server's, when another attempt would not help. EVENTS_COMPACTED is one
// of these: the caller then lists what there is and watches without a token.
//
// To go on in another process, keep the resume_token of a message once what it
// tells is dealt with. WatchEvents does not change req.
func WatchEvents(ctx context.Context, events snapshotdv1.EventServiceClient, req *snapshotdv1.WatchEventsRequest, fn func(*snapshotdv1.WatchEventsResponse) error) error {
	req = proto.CloneOf(req)
	for failures := 0; ; {
		heard, wait, err := watch(ctx, events, req, fn)
		if err != nil {
			return err
		}
		if heard {
			failures = 0
		}
		failures++
		if err := sleep(ctx, max(pause(failures), wait)); err != nil {
			return err
		}
	}
}

// watch follows one stream and notes in req where to resume. Without an error
// the stream is to be opened again, not before wait has passed; heard says whether
// it told anything.
func watch(ctx context.Context, events snapshotdv1.EventServiceClient, req *snapshotdv1.WatchEventsRequest, fn func(*snapshotdv1.WatchEventsResponse) error) (heard bool, wait time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx) // frees the stream when fn ends it
	defer cancel()
	stream, err := events.WatchEvents(ctx, req)
	if err != nil {
		wait, err = unlessGone(ctx, err)
		return false, wait, err
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			wait, err = unlessGone(ctx, err)
			return heard, wait, err
		}
		if err := fn(msg); err != nil {
			return heard, 0, err
		}
		heard = true
		req.ResumeToken = msg.GetResumeToken()
	}
}

// unlessGone returns what a stream that failed with err means to the watch: no
// error, and what the server asks to wait, when only the stream or its server is
// gone.
func unlessGone(ctx context.Context, err error) (wait time.Duration, _ error) {
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case errors.Is(err, io.EOF):
		return 0, nil
	}
	switch status.Code(err) {
	case codes.Unavailable,
		// The deadline, which the server or gRPC may notice before ctx does.
		codes.Canceled, codes.DeadlineExceeded:
		return retryDelay(err), nil
	default:
		return 0, err
	}
}

// WatchRestore calls fn with a restore job whenever it changes, until it has
// ended, which fn sees. A stream that ends before, or whose server becomes
// unavailable, is opened again after a pause. It returns fn's error as it is,
// that of ctx when it ends, or the server's when another attempt would not help.
func WatchRestore(ctx context.Context, snapshots snapshotdv1.SnapshotServiceClient, job int64, fn func(*snapshotdv1.RestoreJob) error) error {
	for failures := 0; ; {
		ended, heard, wait, err := watchRestore(ctx, snapshots, job, fn)
		if err != nil || ended {
			return err
		}
		if heard {
			failures = 0
		}
		failures++
		if err := sleep(ctx, max(pause(failures), wait)); err != nil {
			return err
		}
	}
}

// WaitRestore waits until a restore job has ended, and returns it as it then is:
// whether it is COMPLETED is in its state.
func WaitRestore(ctx context.Context, snapshots snapshotdv1.SnapshotServiceClient, job int64) (*snapshotdv1.RestoreJob, error) {
	var last *snapshotdv1.RestoreJob
	err := WatchRestore(ctx, snapshots, job, func(j *snapshotdv1.RestoreJob) error {
		last = j
		return nil
	})
	return last, err
}

// RestoreEnded says whether a job is in a final state.
func RestoreEnded(job *snapshotdv1.RestoreJob) bool {
	switch job.GetState() {
	case snapshotdv1.RestoreJob_STATE_COMPLETED, snapshotdv1.RestoreJob_STATE_FAILED, snapshotdv1.RestoreJob_STATE_CANCELED:
		return true
	case snapshotdv1.RestoreJob_STATE_UNSPECIFIED, snapshotdv1.RestoreJob_STATE_PENDING, snapshotdv1.RestoreJob_STATE_EXECUTING:
	}
	return false
}

// watchRestore follows one stream.
func watchRestore(ctx context.Context, snapshots snapshotdv1.SnapshotServiceClient, job int64, fn func(*snapshotdv1.RestoreJob) error) (ended, heard bool, wait time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx) // frees the stream when fn ends it
	defer cancel()
	stream, err := snapshots.WatchRestore(ctx, &snapshotdv1.WatchRestoreRequest{JobId: job})
	if err != nil {
		wait, err = unlessGone(ctx, err)
		return false, false, wait, err
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			wait, err = unlessGone(ctx, err)
			return false, heard, wait, err
		}
		heard = true
		if err := fn(msg.GetJob()); err != nil {
			return false, true, 0, err
		}
		if RestoreEnded(msg.GetJob()) {
			return true, true, 0, nil
		}
	}
}
