package etcd

import (
	"errors"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// TestErrors is the table of etcd errors and their classes.
func TestErrors(t *testing.T) {
	classes := []error{
		meta.ErrUnavailable, meta.ErrCompacted, meta.ErrTooOld, meta.ErrDenied, meta.ErrCorrupt, meta.ErrLeaseNotFound,
		meta.ErrNoSpace, meta.ErrTooLarge,
	}
	for _, c := range []struct {
		err  error
		want []error
	}{
		{rpctypes.ErrGRPCNoSpace, []error{meta.ErrNoSpace}},
		{rpctypes.ErrGRPCCorrupt, []error{meta.ErrUnavailable, meta.ErrCorrupt}},
		{rpctypes.ErrGRPCCompacted, []error{meta.ErrCompacted}},
		{rpctypes.ErrGRPCFutureRev, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCLeaseNotFound, []error{meta.ErrLeaseNotFound}},
		{rpctypes.ErrGRPCTooManyOps, []error{meta.ErrTooLarge}},
		{rpctypes.ErrGRPCRequestTooLarge, []error{meta.ErrTooLarge}},
		{rpctypes.ErrGRPCRequestTooManyRequests, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCNoLeader, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCNotLeader, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCLeaderChanged, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCNotCapable, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCStopped, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCTimeout, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCTimeoutDueToLeaderFail, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCTimeoutDueToConnectionLost, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCUnhealthy, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCNotSupportedForLearner, []error{meta.ErrUnavailable}},
		{rpctypes.ErrGRPCPermissionDenied, []error{meta.ErrDenied}},
		{rpctypes.ErrGRPCAuthFailed, []error{meta.ErrDenied}},
		{rpctypes.ErrGRPCUserEmpty, []error{meta.ErrDenied}},
		{rpctypes.ErrGRPCAuthNotEnabled, []error{meta.ErrDenied}},
		{status.Error(codes.Unavailable, "connection refused"), []error{meta.ErrUnavailable}},
		{status.Error(codes.Unknown, "the etcd 3.4.23 "+tooOld), []error{meta.ErrTooOld}},
		{errors.New("anything else"), []error{meta.ErrUnavailable}},
	} {
		got := classOf(c.err)
		if status.Code(got) != codes.Unknown {
			t.Errorf("%v: %v has a status", c.err, got)
		}
		for _, class := range classes {
			want := false
			for _, w := range c.want {
				want = want || errors.Is(w, class)
			}
			if errors.Is(got, class) != want {
				t.Errorf("%v: is %v: %v, want %v", c.err, class, !want, want)
			}
		}
	}
}
