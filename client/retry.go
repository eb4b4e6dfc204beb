package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

// retry retries calls; see the package comment.
type retry struct {
	attempts int // maximum per call
}

func (r retry) intercept(
	ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	for attempt := 1; ; attempt++ {
		err := invoke(ctx, method, req, reply, cc, opts...)
		if err == nil || attempt >= r.attempts || !repeatable(method, req, err) {
			return err
		}
		wait := max(pause(attempt), retryDelay(err))
		// The last error has more information than the end of the deadline.
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
			return err
		}
		if sleep(ctx, wait) != nil {
			return err
		}
		req = retryRequest(req, err)
	}
}

// createAborted is the reason of an abandoned create. Its token is used up; another
// create may start.
const createAborted = "CREATE_ABORTED"

// retryRequest returns the request of the retry after err. An abandoned create gets a
// token that is derived from its own, so that a later repeat under the first token
// passes the same tokens and returns the same snapshot.
func retryRequest(req any, err error) any {
	r, ok := req.(*snapshotdv1.CreateSnapshotRequest)
	if !ok || r.GetRequestToken() == "" || Reason(err) != createAborted {
		return req
	}
	next := proto.CloneOf(r)
	sum := sha256.Sum256([]byte("after " + r.GetRequestToken()))
	next.RequestToken = hex.EncodeToString(sum[:16])
	return next
}

// repeatable reports whether a repeat of a call after err is safe and may succeed.
func repeatable(method string, req any, err error) bool {
	switch status.Code(err) {
	case codes.Unavailable:
		return reads(method) || hasToken(req) || slices.Contains(idempotent, method)
	case codes.Aborted:
		reason := Reason(err)
		if method == snapshotdv1.SnapshotService_CreateSnapshot_FullMethodName {
			return reason == createAborted
		}
		return detail[*errdetails.RetryInfo](err) != nil && (reason == "CONFLICT" || reason == "CATALOG_COMPACTED")
	default:
		return false
	}
}

// idempotent are the methods that write and may be repeated without a token.
var idempotent = []string{
	snapshotdv1.CatalogService_DropSegments_FullMethodName,
	snapshotdv1.CatalogService_SetCheckpoints_FullMethodName,
	snapshotdv1.ReclaimService_Reclaim_FullMethodName,
	snapshotdv1.ReclaimService_ConfirmReclaimed_FullMethodName,
	snapshotdv1.SnapshotService_RenewPin_FullMethodName,
	snapshotdv1.SnapshotService_UnpinSnapshot_FullMethodName,
	snapshotdv1.SnapshotService_UpdateRestore_FullMethodName,
	snapshotdv1.SnapshotService_CancelRestore_FullMethodName,
	snapshotdv1.CollectorService_Recover_FullMethodName,
}

// reads reports whether a method only reads, by the verb of its name.
func reads(fullMethod string) bool {
	name := fullMethod[strings.LastIndexByte(fullMethod, '/')+1:]
	for _, verb := range []string{"Get", "List", "Describe", "Check", "Explain"} {
		if strings.HasPrefix(name, verb) {
			return true
		}
	}
	return false
}

func hasToken(req any) bool {
	r, ok := req.(interface{ GetRequestToken() string })
	return ok && r.GetRequestToken() != ""
}

// retryDelay returns the delay that the server requests.
func retryDelay(err error) time.Duration {
	return detail[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration()
}

// pause returns the random pause after an attempt, counted from 1: between half and
// all of a span that doubles. The variation spreads the retries of several callers.
func pause(attempt int) time.Duration {
	span := min(firstPause<<min(attempt-1, 16), maxPause)
	return span/2 + rand.N(span/2)
}

// sleep waits for d, or until the end of ctx, whose error it returns.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
