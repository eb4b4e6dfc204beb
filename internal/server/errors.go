package server

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// domain is the domain of all reasons.
const domain = "snapshotd"

// Bounds on an error. It is sent in the trailers of a response, of which gRPC clients
// in Java, C and Python accept 8 KiB by default.
const (
	maxMessageText = 2048 // bytes
	maxViolations  = 20
	maxTrailer     = 6 << 10 // bytes of the encoded error
)

// errorSizes are bounds of an error in decreasing order: the bytes of the text, the
// bytes of a text in the details, and the number of violations. An error of the last
// row fits into the trailers with any text.
var errorSizes = []struct{ text, detail, violations int }{
	{maxMessageText, maxMessageText, maxViolations},
	{maxMessageText, 512, maxViolations},
	{maxMessageText, 128, 8},
	{1024, 128, 8},
	{512, 64, 4},
}

// Errors of this package.
var (
	errPageToken = errors.New("invalid page token: it belongs to another cluster or other filters; start without " +
		"one")
	errResumeToken     = errors.New("invalid resume token: it belongs to another cluster or collection; start without one")
	errKeyNotFound     = errors.New("key not found")
	errDenied          = errors.New("permission denied")
	errUnauthenticated = errors.New("the client certificate has no name: it needs a URI or DNS name, or a common name")
	errTooLarge        = fmt.Errorf("message too large: at most %d MiB; send less at a time", maxMessage>>20)
	errTooMany         = fmt.Errorf("message too large: at most %d entries of lists and maps, nested ones included; "+
		"send fewer at a time", maxElements)
	errExports = fmt.Errorf("%d exports of segments are running here, and none ended within %v; nothing was read",
		maxExports, exportWait)
	errSlowReader = fmt.Errorf("no message of this stream was read for %v; resume it with the last token",
		sendTimeout)
)

// errorRow maps an error to a status.
type errorRow struct {
	err    error
	code   codes.Code
	reason string
	// retry is the delay after which the same call may succeed; 0: never.
	retry time.Duration
	// text replaces the error's own text, which may contain internals.
	text string
}

// errorTable holds all errors that a client gets with a reason. The first match wins, so
// a special error precedes a general one. Reasons are part of the API: append, never
// rename.
var errorTable = []errorRow{
	{err: errDenied, code: codes.PermissionDenied, reason: "PERMISSION_DENIED"},
	{err: errUnauthenticated, code: codes.Unauthenticated, reason: "UNAUTHENTICATED"},
	{err: errTooLarge, code: codes.ResourceExhausted, reason: "MESSAGE_TOO_LARGE"},
	{err: errTooMany, code: codes.ResourceExhausted, reason: "MESSAGE_TOO_LARGE"},
	{err: errExports, code: codes.ResourceExhausted, reason: "OVERLOADED", retry: time.Second},
	{err: errSlowReader, code: codes.Unavailable, reason: "SLOW_READER", retry: time.Second},
	{err: errPageToken, code: codes.InvalidArgument, reason: "INVALID_PAGE_TOKEN"},
	{err: errResumeToken, code: codes.InvalidArgument, reason: "INVALID_RESUME_TOKEN"},
	{err: errKeyNotFound, code: codes.NotFound, reason: "KEY_NOT_FOUND"},

	// The error's own text has the cause and the remedy.
	{err: epoch.ErrRolledBack, code: codes.FailedPrecondition, reason: "METADATA_BEHIND"},
	{err: epoch.ErrDamaged, code: codes.DataLoss, reason: "RECORD_UNREADABLE"},

	// Likewise.
	{err: clock.ErrUntrusted, code: codes.Unavailable, reason: "CLOCK_UNTRUSTED", retry: time.Minute},

	{err: request.ErrReused, code: codes.InvalidArgument, reason: "REQUEST_TOKEN_REUSED"},
	{err: catalog.ErrInvalid, code: codes.InvalidArgument, reason: "INVALID_REQUEST"},

	{err: manager.ErrJobForgotten, code: codes.NotFound, reason: "EXPIRED_OR_DROPPED"},
	{err: manager.ErrJobNeverExisted, code: codes.NotFound, reason: "NEVER_EXISTED"},
	{err: snapshot.ErrExpiredOrDropped, code: codes.NotFound, reason: "EXPIRED_OR_DROPPED"},
	{err: snapshot.ErrNeverExisted, code: codes.NotFound, reason: "NEVER_EXISTED"},
	{err: manager.ErrSnapshotNotFound, code: codes.NotFound, reason: "SNAPSHOT_NOT_FOUND"},
	{err: manager.ErrSnapshotExists, code: codes.AlreadyExists, reason: "SNAPSHOT_EXISTS"},
	{err: manager.ErrSnapshotPending, code: codes.FailedPrecondition, reason: "SNAPSHOT_PENDING"},
	{err: manager.ErrSnapshotPinned, code: codes.FailedPrecondition, reason: "SNAPSHOT_PINNED"},
	{err: manager.ErrSnapshotMismatch, code: codes.FailedPrecondition, reason: "SNAPSHOT_MISMATCH"},
	{err: snapshot.ErrNotCommitted, code: codes.FailedPrecondition, reason: "SNAPSHOT_NOT_COMMITTED"},
	{err: snapshot.ErrCorrupt, code: codes.DataLoss, reason: "SNAPSHOT_CORRUPT"},
	{err: manager.ErrPinNotFound, code: codes.NotFound, reason: "PIN_NOT_FOUND"},
	{err: manager.ErrPinHasNoTTL, code: codes.FailedPrecondition, reason: "PIN_HAS_NO_TTL"},
	{err: manager.ErrCutNotReached, code: codes.FailedPrecondition, reason: "CUT_NOT_REACHED"},
	{err: manager.ErrCheckpointMissing, code: codes.FailedPrecondition, reason: "CHECKPOINT_MISSING"},
	{err: manager.ErrNotExact, code: codes.FailedPrecondition, reason: "NOT_EXACT"},
	{err: manager.ErrFileMissing, code: codes.FailedPrecondition, reason: "FILE_MISSING"},
	// The result of a create's token is final, so a retry does not help.
	{err: manager.ErrCreateAborted, code: codes.Aborted, reason: "CREATE_ABORTED"},
	{err: manager.ErrCatalogCompacted, code: codes.Aborted, reason: "CATALOG_COMPACTED", retry: time.Second},
	{err: object.ErrStoreNotFound, code: codes.NotFound, reason: "STORE_NOT_FOUND"},
	{err: manager.ErrEventsCompacted, code: codes.OutOfRange, reason: "EVENTS_COMPACTED"},
	{
		err: manager.ErrNotReady, code: codes.Unavailable, reason: "STORE_UNAVAILABLE", retry: time.Second,
		text: "the object store has not answered since this replica started: it changes nothing until it does; " +
			"nothing was written, call again",
	},
	{err: manager.ErrStopping, code: codes.Unavailable, reason: "STOPPING", retry: time.Second},
	{err: manager.ErrOverloaded, code: codes.ResourceExhausted, reason: "OVERLOADED", retry: time.Second},
	// The caller has to read the current record first.
	{err: manager.ErrRevisionChanged, code: codes.Aborted, reason: "REVISION_CHANGED"},

	{err: manager.ErrChannelMismatch, code: codes.FailedPrecondition, reason: "CHANNEL_MISMATCH"},
	{err: manager.ErrLayoutRefused, code: codes.FailedPrecondition, reason: "LAYOUT_REFUSED"},
	{err: manager.ErrStoreUnfit, code: codes.FailedPrecondition, reason: "STORE_UNFIT"},
	{err: manager.ErrPinOfRestore, code: codes.FailedPrecondition, reason: "PIN_OF_RESTORE"},
	{err: copyjob.ErrJobNotFound, code: codes.NotFound, reason: "RESTORE_NOT_FOUND"},
	{err: copyjob.ErrEnded, code: codes.FailedPrecondition, reason: "RESTORE_ENDED"},

	{err: gc.ErrLoading, code: codes.Unavailable, reason: "REFERENCES_LOADING", retry: time.Second},
	{err: gc.ErrUnreadable, code: codes.FailedPrecondition, reason: "REFERENCES_UNREADABLE"},
	{err: collect.ErrOrphanOptions, code: codes.InvalidArgument, reason: "INVALID_REQUEST"},

	{err: catalog.ErrRevisionChanged, code: codes.Aborted, reason: "REVISION_CHANGED"},
	{err: meta.ErrConflict, code: codes.Aborted, reason: "CONFLICT", retry: 100 * time.Millisecond},
	{err: catalog.ErrCollectionNotFound, code: codes.NotFound, reason: "COLLECTION_NOT_FOUND"},
	{err: catalog.ErrCollectionExists, code: codes.AlreadyExists, reason: "COLLECTION_EXISTS"},
	{err: catalog.ErrCollectionNotActive, code: codes.FailedPrecondition, reason: "COLLECTION_NOT_ACTIVE"},
	{err: catalog.ErrCollectionMismatch, code: codes.FailedPrecondition, reason: "COLLECTION_MISMATCH"},
	{err: catalog.ErrPartitionNotFound, code: codes.NotFound, reason: "PARTITION_NOT_FOUND"},
	{err: catalog.ErrPartitionExists, code: codes.AlreadyExists, reason: "PARTITION_EXISTS"},
	{err: catalog.ErrIndexNotFound, code: codes.NotFound, reason: "INDEX_NOT_FOUND"},
	{err: catalog.ErrIndexExists, code: codes.AlreadyExists, reason: "INDEX_EXISTS"},
	{err: catalog.ErrIndexBuildExists, code: codes.AlreadyExists, reason: "INDEX_BUILD_EXISTS"},
	{err: catalog.ErrSegmentNotFound, code: codes.NotFound, reason: "SEGMENT_NOT_FOUND"},
	{err: catalog.ErrSegmentExists, code: codes.AlreadyExists, reason: "SEGMENT_EXISTS"},
	{err: catalog.ErrSegmentState, code: codes.FailedPrecondition, reason: "SEGMENT_STATE"},
	{err: catalog.ErrFileNotFound, code: codes.NotFound, reason: "FILE_NOT_FOUND"},
	{err: catalog.ErrFileExists, code: codes.AlreadyExists, reason: "FILE_EXISTS"},
	{err: catalog.ErrCheckpointRegression, code: codes.FailedPrecondition, reason: "CHECKPOINT_REGRESSION"},
	{err: catalog.ErrIDNotAllocated, code: codes.FailedPrecondition, reason: "ID_NOT_ALLOCATED"},
	{err: catalog.ErrIDUsed, code: codes.AlreadyExists, reason: "ID_USED"},
	{err: catalog.ErrIDOwned, code: codes.AlreadyExists, reason: "ID_OWNED"},
	{err: catalog.ErrPlaceOwned, code: codes.AlreadyExists, reason: "PLACE_OWNED"},
	{err: catalog.ErrRootNested, code: codes.FailedPrecondition, reason: "ROOT_NESTED"},
	{err: catalog.ErrIDRangeTaken, code: codes.FailedPrecondition, reason: "ID_RANGE_TAKEN"},
	{err: catalog.ErrReserveNotAllowed, code: codes.FailedPrecondition, reason: "RESERVE_NOT_ALLOWED"},
	{err: catalog.ErrLimitExceeded, code: codes.FailedPrecondition, reason: "LIMIT_EXCEEDED"},
	{err: catalog.ErrTooLarge, code: codes.FailedPrecondition, reason: "TOO_LARGE"},

	{err: meta.ErrTooLarge, code: codes.FailedPrecondition, reason: "TOO_LARGE"},
	{err: meta.ErrCompacted, code: codes.Aborted, reason: "CATALOG_COMPACTED", retry: time.Second},
	// Watchers handle it; a repeated call starts a new read.
	{err: meta.ErrWatchBroken, code: codes.Aborted, reason: "CATALOG_COMPACTED", retry: time.Second},
	{err: record.ErrUnreadable, code: codes.DataLoss, reason: "RECORD_UNREADABLE"},
	{err: manifest.ErrNewerFormat, code: codes.FailedPrecondition, reason: "FORMAT_TOO_NEW"},
	{
		err: meta.ErrTooOld, code: codes.FailedPrecondition, reason: "METADATA_STORE_TOO_OLD",
		text: "the metadata store is too old for snapshotd; its log names the server and the needed version",
	},
	{
		err: meta.ErrDenied, code: codes.FailedPrecondition, reason: "METADATA_STORE_DENIED",
		text: "the metadata store denies access to snapshotd; its log names the denied access",
	},
	{
		err: meta.ErrCorrupt, code: codes.DataLoss, reason: "METADATA_STORE_CORRUPT",
		text: "the metadata store has found its data damaged, and serves nothing until an operator has repaired it; " +
			"its log has the details",
	},
	{
		err: meta.ErrNoSpace, code: codes.ResourceExhausted, reason: "STORE_FULL",
		text: "the metadata store is full and refuses new data: drop unneeded data; its log has the details",
	},
	{
		err: meta.ErrUnavailable, code: codes.Unavailable, reason: "STORE_UNAVAILABLE", retry: time.Second,
		text: "the metadata store did not answer; a write may have happened: repeat the call with the same request_token",
	},
	{
		err: object.ErrFull, code: codes.ResourceExhausted, reason: "STORE_FULL",
		text: "the object store is full: free space there or enlarge it, then call again with a new request_token",
	},
	{
		err: object.ErrDenied, code: codes.FailedPrecondition, reason: "OBJECT_STORE_DENIED",
		text: "the object store denies access to snapshotd; its log names the missing right",
	},
	{
		err: object.ErrMisconfigured, code: codes.FailedPrecondition, reason: "OBJECT_STORE_MISCONFIGURED",
		text: "the object store does not match snapshotd's configuration; its log has the difference",
	},
	{
		err: object.ErrUnavailable, code: codes.Unavailable, reason: "STORE_UNAVAILABLE", retry: time.Second,
		text: "the object store did not answer; a write may have happened: repeat the call with the same request_token",
	},
	{
		err: context.DeadlineExceeded, code: codes.DeadlineExceeded, reason: "DEADLINE_EXCEEDED",
		text: "the deadline ended before the call did; a write may have happened: repeat the call with the same " +
			"request_token",
	},
	{
		err: context.Canceled, code: codes.Canceled, reason: "CANCELED",
		text: "the caller canceled the call; a write may have happened: repeat the call with the same request_token",
	},
}

// statusError is an error in the form in which a client gets it. Only errors of this type
// pass toStatusError unchanged: the status of any other error is that of a store's
// client, and might make our client repeat a call that has taken effect.
type statusError struct {
	status *status.Status
	reason string
	// cause is the original error, for the log.
	cause error
}

func (e *statusError) Error() string              { return e.status.Message() }
func (e *statusError) GRPCStatus() *status.Status { return e.status }
func (e *statusError) Unwrap() error              { return e.cause }

// toStatusError converts any error. An error without a row in the errorTable may contain
// internals: the client gets only the request id, under which the log has the error.
func toStatusError(err error, requestID string) *statusError {
	if e, ok := err.(*statusError); ok { //nolint:errorlint // a wrapped one is not final
		return e
	}
	if invalid, ok := errors.AsType[*protovalidate.ValidationError](err); ok {
		return invalidRequest(err, violations(invalid))
	}
	for i := range errorTable {
		if row := &errorTable[i]; errors.Is(err, row.err) {
			return row.statusError(err)
		}
	}
	return newStatusError(err, codes.Internal, "INTERNAL",
		"internal error; the server's log has it under request id "+requestID)
}

// statusError converts an error that matches the row.
func (row *errorRow) statusError(err error) *statusError {
	text := row.text
	if text == "" {
		text = err.Error()
	}
	if row.err == catalog.ErrInvalid { //nolint:errorlint // compares the row
		var fields []*errdetails.BadRequest_FieldViolation
		if invalid, ok := errors.AsType[*catalog.InvalidError](err); ok {
			fields = append(fields, &errdetails.BadRequest_FieldViolation{
				Field: invalid.Field, Description: clip(invalid.Problem),
			})
		}
		return invalidRequest(err, fields)
	}
	if full, ok := errors.AsType[*object.FullError](err); ok && row.err == object.ErrFull { //nolint:errorlint // the row
		text = full.Error() + "; free space there or enlarge it, then call again with a new request_token"
	}
	var details []protoadapt.MessageV1
	if row.code == codes.FailedPrecondition {
		violation := &errdetails.PreconditionFailure_Violation{Type: row.reason, Description: clip(text)}
		details = append(details, &errdetails.PreconditionFailure{
			Violations: []*errdetails.PreconditionFailure_Violation{violation},
		})
	}
	if row.retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(row.retry)})
	}
	return newStatusError(err, row.code, row.reason, text, details...)
}

// newStatusError returns a statusError whose texts are clipped until it fits into the
// trailers.
func newStatusError(
	cause error, code codes.Code, reason, text string, details ...protoadapt.MessageV1,
) *statusError {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: domain}
	var st *status.Status
	for _, size := range errorSizes {
		st = status.New(code, record.Clip(text, size.text))
		all := []protoadapt.MessageV1{info}
		for _, d := range details {
			all = append(all, clipDetail(d, size.detail, size.violations))
		}
		if full, err := st.WithDetails(all...); err == nil {
			st = full
		}
		if trailerBytes(st) <= maxTrailer {
			break
		}
	}
	return &statusError{status: st, reason: reason, cause: cause}
}

// clipDetail returns a detail of an error with texts of at most maxText bytes, and at
// most so many violations.
func clipDetail(d protoadapt.MessageV1, maxText, violations int) protoadapt.MessageV1 {
	switch d := d.(type) {
	case *errdetails.BadRequest:
		out := &errdetails.BadRequest{}
		for _, v := range d.GetFieldViolations()[:min(len(d.GetFieldViolations()), violations)] {
			out.FieldViolations = append(out.FieldViolations, &errdetails.BadRequest_FieldViolation{
				Field: record.Clip(v.GetField(), maxText), Description: record.Clip(v.GetDescription(), maxText),
			})
		}
		return out
	case *errdetails.PreconditionFailure:
		out := &errdetails.PreconditionFailure{}
		for _, v := range d.GetViolations() {
			out.Violations = append(out.Violations, &errdetails.PreconditionFailure_Violation{
				Type: v.GetType(), Subject: v.GetSubject(), Description: record.Clip(v.GetDescription(), maxText),
			})
		}
		return out
	}
	return d
}

// trailerBytes returns the bytes of a status in the trailers: its text, with three bytes
// for each unprintable one, and the whole status in base64.
func trailerBytes(st *status.Status) int {
	size := base64.StdEncoding.EncodedLen(proto.Size(st.Proto()))
	for _, b := range []byte(st.Message()) {
		if size++; b < ' ' || b > '~' || b == '%' {
			size += 2
		}
	}
	return size
}

func invalidRequest(cause error, fields []*errdetails.BadRequest_FieldViolation) *statusError {
	text := cause.Error()
	if len(fields) > 0 {
		var parts []string
		for _, f := range fields {
			parts = append(parts, strings.TrimPrefix(record.Clip(f.GetField(), maxFieldText)+": "+f.GetDescription(), ": "))
		}
		text = strings.Join(parts, "; ")
	}
	return newStatusError(cause, codes.InvalidArgument, "INVALID_REQUEST", "invalid request: "+text,
		&errdetails.BadRequest{FieldViolations: fields})
}

// maxFieldText bounds the name of a field in an error, in bytes: it contains map keys.
const maxFieldText = 256

// violations returns the first maxViolations violations of a validation.
func violations(err *protovalidate.ValidationError) []*errdetails.BadRequest_FieldViolation {
	var list []*errdetails.BadRequest_FieldViolation
	for _, v := range err.Violations[:min(len(err.Violations), maxViolations)] {
		text := v.Proto.GetMessage()
		if v.Proto.GetRuleId() == "string.pattern" && v.RuleValue.IsValid() && v.RuleValue.String() == catalog.NamePattern {
			text = "is not a name: a name has 1 to 255 of A-Z a-z 0-9 _ . - and begins with none of . -"
		}
		list = append(list, &errdetails.BadRequest_FieldViolation{
			Field: record.Clip(protovalidate.FieldPathString(v.Proto.GetField()), maxFieldText), Description: clip(text),
		})
	}
	return list
}

// fromStream converts gRPC's own error of a stream. After a failed receive gRPC has
// already sent its status, without a reason.
func fromStream(err error) error {
	switch status.Code(err) {
	case codes.ResourceExhausted:
		return toStatusError(errTooLarge, "")
	case codes.Canceled:
		return toStatusError(context.Canceled, "")
	case codes.DeadlineExceeded:
		return toStatusError(context.DeadlineExceeded, "")
	default:
		return &statusError{status: status.Convert(err), cause: err}
	}
}

// clip bounds a text to maxMessageText bytes of valid UTF-8, as messages require.
func clip(s string) string { return record.Clip(s, maxMessageText) }
