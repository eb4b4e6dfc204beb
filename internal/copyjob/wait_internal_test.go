package copyjob

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestUnanswered separates what a store answered, which counts, from what it did not.
func TestUnanswered(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{object.ErrUnavailable, true},
		{fmt.Errorf("copy x: %w: %w", object.ErrUnavailable, context.DeadlineExceeded), true},
		{meta.ErrUnavailable, true},
		{meta.ErrNoSpace, true},
		{context.DeadlineExceeded, true},
		{errors.New("verify the copy of x: another ETag"), false},
		{errPins, false},
		{object.ErrNotFound, false},
		{fmt.Errorf("%w: %w", object.ErrDenied, object.ErrUnavailable), false},
		{fmt.Errorf("%w: %w", ErrDigest, object.ErrUnavailable), false},
		{fmt.Errorf("%w: x", errSourceAltered), false},
		{meta.ErrTooLarge, false},
	} {
		if got := isUnanswered(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}

// TestAfter follows a task through attempts that end in each way.
func TestAfter(t *testing.T) {
	away, broken := fmt.Errorf("x: %w", object.ErrUnavailable), errors.New("broken")
	at := func(d time.Duration) time.Time { return start.Add(d) }
	for name, c := range map[string]struct {
		before task
		cause  error
		files  int64 // finished in the attempt, the last at a minute
		want   task
	}{
		"first wait": {
			task{state: TaskRunning, failures: 2},
			away, 0,
			task{
				state: TaskPending, failures: 2, unanswered: 1, waits: 1, waitSince: at(time.Hour), waitTime: at(time.Hour),
				notBefore: at(time.Hour + 200*time.Millisecond),
			},
		},
		"one of many": {
			task{unanswered: 70, waits: 60, waitSince: start, finished: 5},
			away, 5,
			task{
				state: TaskPending, unanswered: 71, waits: 61, waitSince: start, waitTime: at(time.Hour), finished: 5,
				notBefore: at(time.Hour + time.Minute),
			},
		},
		"one that got further": {
			task{unanswered: 70, waits: 60, waitSince: start, finished: 5},
			away, 6,
			task{
				state: TaskPending, unanswered: 71, waits: 1, waitSince: at(time.Hour), waitTime: at(time.Hour), finished: 6,
				finishTime: at(time.Minute), notBefore: at(time.Hour + 200*time.Millisecond),
			},
		},
		"answered with an error": {
			task{unanswered: 70, waits: 60, waitSince: start, waitTime: start, failures: 3},
			broken, 0,
			task{state: TaskPending, unanswered: 70, failures: 4, notBefore: at(time.Hour + 1600*time.Millisecond)},
		},
		"answered for good": {
			task{failures: 3},
			errSourceMissing, 2,
			task{state: TaskFailed, failures: 4, finished: 2, finishTime: at(time.Minute)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := c.before.after(c.cause, &progress{files: c.files, more: at(time.Minute)}, at(time.Hour), 12)
			c.want.reason, c.want.message = got.reason, c.cause.Error()
			if diff := cmp.Diff(&c.want, got, cmp.AllowUnexported(task{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			kv := meta.KeyValue{Key: "/job/task/1/1", Value: got.encode("op")}
			back, err := decodeTask(kv)
			if err != nil {
				t.Fatal(err)
			}
			if want, text := got.waitSince, back.waitSince; !want.Equal(text) || back.waits != got.waits || back.unanswered != got.unanswered ||
				!back.finishTime.Equal(got.finishTime) || back.finished != got.finished || !back.waitTime.Equal(got.waitTime) {
				t.Errorf("%+v is read as %+v", got, back)
			}
		})
	}
}
