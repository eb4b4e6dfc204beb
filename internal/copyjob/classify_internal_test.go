package copyjob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestReasonsAreDocumented checks that the document for operators has each reason of a failed
// job.
func TestReasonsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, list, found := strings.Cut(string(doc), "\nThe reasons of a failed job:\n")
	list, _, ends := strings.Cut(list, "\n## ")
	if !found || !ends {
		t.Fatal("operations.md has no list of reasons")
	}
	reasons := []string{reasonStalled, "TIMEOUT", "TOO_MANY_FAILURES"} // of decide
	for _, c := range failureClasses {
		reasons = append(reasons, c.reason)
	}
	for _, reason := range reasons {
		if !strings.Contains(list, reason+"**") && !strings.Contains(list, reason+",") {
			t.Errorf("operations.md does not have %s", reason)
		}
	}
}

// TestClassify checks the reason of each error and whether it is permanent.
func TestClassify(t *testing.T) {
	for _, c := range []struct {
		err       error
		reason    string
		permanent bool
	}{
		{fmt.Errorf("%w: %w", snapshot.ErrDigest, manifest.ErrCorrupt), "SNAPSHOT_CORRUPT", false}, // may be a transfer error
		{errSourceMissing, "SOURCE_OBJECT_MISSING", true},
		{errSourceAltered, "SOURCE_OBJECT_ALTERED", true},
		{fmt.Errorf("%w: %w", errUnreadable, object.ErrUnavailable), "SNAPSHOT_CORRUPT", true},
		{errMapping, "INTERNAL", true},
		{errNoStore, "TASK_FAILED", false}, // another replica may have it
		{object.ErrFull, "STORE_FULL", false},
		{object.ErrDenied, "OBJECT_STORE_DENIED", true},
		{object.ErrMisconfigured, "OBJECT_STORE_MISCONFIGURED", true},
		{object.ErrInvalidKey, "LAYOUT_REFUSED", true},
		{&layout.RefusedError{Reason: errors.New("r")}, "LAYOUT_REFUSED", true},
		{catalog.ErrLimitExceeded, "LIMIT_EXCEEDED", true},
		{meta.ErrTooLarge, "LIMIT_EXCEEDED", true},
		{object.ErrUnavailable, "OBJECT_STORE_UNAVAILABLE", false},
		{object.ErrNotFound, "TASK_FAILED", false},
		{meta.ErrUnavailable, "METADATA_STORE_UNAVAILABLE", false},
		{meta.ErrNoSpace, "METADATA_STORE_UNAVAILABLE", false},
		{io.EOF, "TASK_FAILED", false},
		{errChanged, "TASK_FAILED", false},
		{nil, "TASK_FAILED", false},
	} {
		err := c.err
		if err != nil {
			err = fmt.Errorf("task: %w", err)
		}
		if reason, permanent := classify(err, false); reason != c.reason || permanent != c.permanent {
			t.Errorf("%v: %s, %v; want %s, %v", c.err, reason, permanent, c.reason, c.permanent)
		}
		last := c.permanent || errors.Is(c.err, snapshot.ErrDigest) || errors.Is(c.err, object.ErrFull)
		if reason, permanent := classify(err, true); reason != c.reason || permanent != last {
			t.Errorf("%v, last attempt: %s, %v; want %s, %v", c.err, reason, permanent, c.reason, last)
		}
	}
}

// TestUnanswered separates answers of a store, which count as failures, from missing ones.
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
		{fmt.Errorf("%w: %w", snapshot.ErrDigest, object.ErrUnavailable), false},
		{fmt.Errorf("%w: x", errSourceAltered), false},
		{meta.ErrTooLarge, false},
	} {
		if got := isUnanswered(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}

// TestRefused separates refusals that are tried again from those that end a job.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{object.Passing(object.ErrDenied), true},
		{fmt.Errorf("copy x: %w: AccessDenied", object.Passing(object.ErrMisconfigured)), true},
		{object.ErrDenied, false},
		{object.ErrMisconfigured, false},
		{object.ErrUnavailable, false},
		{fmt.Errorf("%w: x", errUnreadable), false},
	} {
		if got := isRefused(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
		if isUnanswered(c.err) && c.want {
			t.Errorf("%v counts twice", c.err)
		}
		if _, permanent := classify(c.err, false); c.want && permanent {
			t.Errorf("%v is permanent at once", c.err)
		}
		if _, permanent := classify(c.err, true); c.want && !permanent {
			t.Errorf("%v is never permanent", c.err)
		}
	}
	if d := refusedFor(1); d != 0 {
		t.Errorf("refused once for %v", d)
	}
	if d := refusedFor(3); d != 600*time.Millisecond {
		t.Errorf("refused three times for %v", d)
	}
}
