package copyjob

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestAfterAttempt checks the task after an attempt with each kind of result.
func TestAfterAttempt(t *testing.T) {
	unavailable, broken := fmt.Errorf("x: %w", object.ErrUnavailable), errors.New("broken")
	denied := fmt.Errorf("x: %w", object.Passing(object.ErrDenied))
	at := func(d time.Duration) time.Time { return start.Add(d) }
	for name, c := range map[string]struct {
		before task
		cause  error
		files  int64 // finished in the attempt, the last one at a minute
		want   task
	}{
		"first wait": {
			task{state: TaskRunning, failures: 2},
			unavailable, 0,
			task{
				state: TaskPending, failures: 2, unanswered: 1, waits: 1, waitSince: at(time.Hour), waitTime: at(time.Hour),
				notBefore: at(time.Hour + 200*time.Millisecond),
			},
		},
		"wait after many": {
			task{unanswered: 70, waits: 60, waitSince: start, finished: 5},
			unavailable, 5,
			task{
				state: TaskPending, unanswered: 71, waits: 61, waitSince: start, waitTime: at(time.Hour), finished: 5,
				notBefore: at(time.Hour + time.Minute),
			},
		},
		"wait after progress": {
			task{unanswered: 70, waits: 60, waitSince: start, finished: 5},
			unavailable, 6,
			task{
				state: TaskPending, unanswered: 71, waits: 1, waitSince: at(time.Hour), waitTime: at(time.Hour), finished: 6,
				finishTime: at(time.Minute), notBefore: at(time.Hour + 200*time.Millisecond),
			},
		},
		"error that may pass": {
			task{unanswered: 70, waits: 60, waitSince: start, waitTime: start, failures: 3},
			broken, 0,
			task{state: TaskPending, unanswered: 70, failures: 4, notBefore: at(time.Hour + 1600*time.Millisecond)},
		},
		"permanent error": {
			task{failures: 3},
			errSourceMissing, 2,
			task{state: TaskFailed, failures: 4, finished: 2, finishTime: at(time.Minute)},
		},
		"first refusal": {
			task{state: TaskRunning, failures: 2},
			denied, 0,
			task{
				state: TaskPending, failures: 2, unanswered: 1, waits: 1, waitSince: at(time.Hour), waitTime: at(time.Hour),
				refusals: 1, refuseSince: at(time.Hour), notBefore: at(time.Hour + 200*time.Millisecond),
			},
		},
		"last refusal but one": {
			task{unanswered: 11, waits: 11, waitSince: start, refusals: 11, refuseSince: start},
			denied, 0,
			task{
				state: TaskPending, unanswered: 12, waits: 12, waitSince: start, waitTime: at(time.Hour),
				refusals: 12, refuseSince: start, notBefore: at(time.Hour + time.Minute),
			},
		},
		"last refusal": {
			task{unanswered: 13, waits: 13, waitSince: start, waitTime: start, refusals: 13, refuseSince: start},
			denied, 0,
			task{
				state: TaskFailed, failures: 1, unanswered: 13, waits: 13, waitSince: start, waitTime: start,
				refusals: 14, refuseSince: start,
				message: "refused for 5m42s: " + denied.Error(),
			},
		},
		"refused after progress": {
			task{unanswered: 13, waits: 13, waitSince: start, refusals: 13, refuseSince: start, finished: 5},
			denied, 6,
			task{
				state: TaskPending, unanswered: 14, waits: 1, waitSince: at(time.Hour), waitTime: at(time.Hour), finished: 6,
				refusals: 1, refuseSince: at(time.Hour), finishTime: at(time.Minute),
				notBefore: at(time.Hour + 200*time.Millisecond),
			},
		},
		"unanswered after refusals": {
			task{unanswered: 13, waits: 13, waitSince: start, refusals: 13, refuseSince: start},
			unavailable, 0,
			task{
				state: TaskPending, unanswered: 14, waits: 14, waitSince: start, waitTime: at(time.Hour),
				notBefore: at(time.Hour + time.Minute),
			},
		},
		"error after refusals": {
			task{unanswered: 13, waits: 13, waitSince: start, refusals: 13, refuseSince: start},
			broken, 0,
			task{state: TaskPending, unanswered: 13, failures: 1, notBefore: at(time.Hour + 200*time.Millisecond)},
		},
		"permanent refusal": {
			task{},
			fmt.Errorf("x: %w", object.ErrMisconfigured), 0,
			task{state: TaskFailed, failures: 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := &Options{MaxFailures: 12, RefusalTimeout: 5 * time.Minute}
			got := c.before.afterAttempt(c.cause, &progress{files: c.files, advanced: at(time.Minute)}, at(time.Hour), o)
			if c.want.reason = got.reason; c.want.message == "" {
				c.want.message = c.cause.Error()
			}
			if diff := cmp.Diff(&c.want, got, cmp.AllowUnexported(task{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			kv := meta.KeyValue{Key: "/job/task/1/1", Value: got.encode("op")}
			back, err := decodeTask(kv)
			if err != nil {
				t.Fatal(err)
			}
			if !back.waitSince.Equal(got.waitSince) || back.waits != got.waits || back.unanswered != got.unanswered ||
				!back.finishTime.Equal(got.finishTime) || back.refusals != got.refusals ||
				!back.refuseSince.Equal(got.refuseSince) || back.finished != got.finished ||
				!back.waitTime.Equal(got.waitTime) {
				t.Errorf("%+v is decoded as %+v", got, back)
			}
		})
	}
}
