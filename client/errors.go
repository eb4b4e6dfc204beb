package client

import (
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// domain is the ErrorInfo domain of snapshotd's reasons.
const domain = "snapshotd"

// Reason returns the stable reason of an error of snapshotd, such as
// "SNAPSHOT_EXISTS"; the API's comments list them at each call. It is empty for nil
// and for errors of other origin, such as the transport. A wrapped error has its
// reason. A message that gRPC itself refuses for its size is MESSAGE_TOO_LARGE as
// well.
func Reason(err error) string {
	if info := detail[*errdetails.ErrorInfo](err); info.GetDomain() == domain {
		return info.GetReason()
	}
	if st, ok := status.FromError(err); ok && st.Code() == codes.ResourceExhausted &&
		strings.Contains(st.Message(), tooLarge) {
		return "MESSAGE_TOO_LARGE"
	}
	return ""
}

// tooLarge is a part of gRPC's error for a message above a limit, in both directions.
const tooLarge = "message larger than max"

// Violation is a field of a request that violates its rule.
type Violation struct {
	Field       string // path, for example "collection.name.db"
	Description string // violated rule
}

// Violations returns the violations in an INVALID_ARGUMENT error.
func Violations(err error) []Violation {
	var vs []Violation
	for _, v := range detail[*errdetails.BadRequest](err).GetFieldViolations() {
		vs = append(vs, Violation{Field: v.GetField(), Description: v.GetDescription()})
	}
	return vs
}

// detail returns the first detail of type T in a status error, or T's zero value.
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
