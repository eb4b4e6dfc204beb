package client

import (
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// domain is the ErrorInfo domain of snapshotd's reasons.
const domain = "snapshotd"

// Reason returns the stable reason of an error that snapshotd answered with,
// such as "SNAPSHOT_EXISTS"; the API's comments list them at each call. It is
// empty for nil and for errors that came from elsewhere, the transport for one.
// An error that wraps such an answer has its reason. What gRPC itself refuses for its
// size, before snapshotd sees it, is MESSAGE_TOO_LARGE as well.
func Reason(err error) string {
	if info := detail[*errdetails.ErrorInfo](err); info.GetDomain() == domain {
		return info.GetReason()
	}
	if st, ok := status.FromError(err); ok && st.Code() == codes.ResourceExhausted && strings.Contains(st.Message(), tooLarge) {
		return "MESSAGE_TOO_LARGE"
	}
	return ""
}

// tooLarge is in what gRPC says of a message above a limit, in whichever direction.
const tooLarge = "message larger than max"

// Violation says which field of a request breaks its rule.
type Violation struct {
	Field       string // the path, for example "collection.name.db"
	Description string // the rule that it breaks
}

// Violations returns what an INVALID_ARGUMENT answer says about single fields.
func Violations(err error) []Violation {
	var vs []Violation
	for _, v := range detail[*errdetails.BadRequest](err).GetFieldViolations() {
		vs = append(vs, Violation{Field: v.GetField(), Description: v.GetDescription()})
	}
	return vs
}

// detail returns the first detail of type T that a status error carries, or
// T's zero value.
func detail[T any](err error) T {
	var none T
	if err == nil {
		return none
	}
	st, ok := status.FromError(err)
	if !ok {
		return none
	}
	for _, d := range st.Details() {
		if t, ok := d.(T); ok {
			return t
		}
	}
	return none
}
