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
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// domain is that of all reasons.
const domain = "snapshotd"

// Bounds on what an error tells. It travels in the trailers of a response, of which
// clients of gRPC in Java, C and Python take 8 KiB unless they ask for more.
const (
	maxMessageText = 2048 // bytes
	maxViolations  = 20
	maxTrailer     = 6 << 10 // bytes of the error as it is encoded there
)

// fits are the bounds of ever shorter errors: of the text, of a text in the details, and
// how many violations these name. The last one fits whatever the texts hold.
var fits = []struct{ text, detail, violations int }{
	{maxMessageText, maxMessageText, maxViolations},
	{maxMessageText, 512, maxViolations},
	{maxMessageText, 128, 8},
	{1024, 128, 8},
	{512, 64, 4},
}

// Errors of this package.
var (
	errPageToken       = errors.New("invalid page token: it is not of this cluster, or was made for other filters; begin without one")
	errResumeToken     = errors.New("invalid resume token: it is not of this cluster, or was made for another collection; begin without one")
	errKeyNotFound     = errors.New("key not found")
	errDenied          = errors.New("permission denied")
	errUnauthenticated = errors.New("the client certificate names nobody: it needs a URI or DNS name, or a common name")
	errTooLarge        = fmt.Errorf("message too large: at most %d MiB; send less at a time", maxMessage>>20)
	errTooMany         = fmt.Errorf("message too large: at most %d entries of lists and maps, nested ones included; send fewer at a time", maxElements)
	errExports         = fmt.Errorf("%d exports of segments are under way here, and none ended within %v; nothing was read", maxExports, exportWait)
	errSlowReader      = fmt.Errorf("the messages of this stream were not read for %v; resume it with the last token", sendTimeout)
)

// class says what an error means to a client.
type class struct {
	err    error
	code   codes.Code
	reason string
	// retry is how long to wait before the very same call may go better; 0: it
	// will not.
	retry time.Duration
	// text is what the client is told instead of the error's own text, which may
	// hold what is no business of his.
	text string
}

// classes holds every error that a client is told of. The first match wins, so
// what is more special comes first. Reasons are part of the API: append, never
// rename.
var classes = []class{
	{err: errDenied, code: codes.PermissionDenied, reason: "PERMISSION_DENIED"},
	{err: errUnauthenticated, code: codes.Unauthenticated, reason: "UNAUTHENTICATED"},
	{err: errTooLarge, code: codes.ResourceExhausted, reason: "MESSAGE_TOO_LARGE"},
	{err: errTooMany, code: codes.ResourceExhausted, reason: "MESSAGE_TOO_LARGE"},
	{err: errExports, code: codes.ResourceExhausted, reason: "OVERLOADED", retry: time.Second},
	{err: errSlowReader, code: codes.Unavailable, reason: "SLOW_READER", retry: time.Second},
	{err: errPageToken, code: codes.InvalidArgument, reason: "INVALID_PAGE_TOKEN"},
	{err: errResumeToken, code: codes.InvalidArgument, reason: "INVALID_RESUME_TOKEN"},
	{err: errKeyNotFound, code: codes.NotFound, reason: "KEY_NOT_FOUND"},

	// Its own text says what was seen, and the way out.
	{err: epoch.ErrRolledBack, code: codes.FailedPrecondition, reason: "METADATA_BEHIND"},
	{err: epoch.ErrDamaged, code: codes.DataLoss, reason: "RECORD_UNREADABLE"},

	// Likewise.
	{err: clock.ErrUntrusted, code: codes.Unavailable, reason: "CLOCK_UNTRUSTED", retry: time.Minute},

	{err: request.ErrReused, code: codes.InvalidArgument, reason: "REQUEST_TOKEN_REUSED"},
	{err: catalog.ErrInvalid, code: codes.InvalidArgument, reason: "INVALID_REQUEST"},

	{err: manager.ErrJobForgotten, code: codes.NotFound, reason: "EXPIRED_OR_DROPPED"},
	{err: manager.ErrJobNeverExisted, code: codes.NotFound, reason: "NEVER_EXISTED"},
	{err: manager.ErrExpiredOrDropped, code: codes.NotFound, reason: "EXPIRED_OR_DROPPED"},
	{err: manager.ErrNeverExisted, code: codes.NotFound, reason: "NEVER_EXISTED"},
	{err: manager.ErrSnapshotNotFound, code: codes.NotFound, reason: "SNAPSHOT_NOT_FOUND"},
	{err: manager.ErrSnapshotExists, code: codes.AlreadyExists, reason: "SNAPSHOT_EXISTS"},
	{err: manager.ErrSnapshotPending, code: codes.FailedPrecondition, reason: "SNAPSHOT_PENDING"},
	{err: manager.ErrSnapshotPinned, code: codes.FailedPrecondition, reason: "SNAPSHOT_PINNED"},
	{err: manager.ErrSnapshotMismatch, code: codes.FailedPrecondition, reason: "SNAPSHOT_MISMATCH"},
	{err: manager.ErrSnapshotNotCommitted, code: codes.FailedPrecondition, reason: "SNAPSHOT_NOT_COMMITTED"},
	{err: manager.ErrSnapshotCorrupt, code: codes.DataLoss, reason: "SNAPSHOT_CORRUPT"},
	{err: manager.ErrPinNotFound, code: codes.NotFound, reason: "PIN_NOT_FOUND"},
	{err: manager.ErrPinHasNoTTL, code: codes.FailedPrecondition, reason: "PIN_HAS_NO_TTL"},
	{err: manager.ErrCutNotReached, code: codes.FailedPrecondition, reason: "CUT_NOT_REACHED"},
	{err: manager.ErrCheckpointMissing, code: codes.FailedPrecondition, reason: "CHECKPOINT_MISSING"},
	{err: manager.ErrNotExact, code: codes.FailedPrecondition, reason: "NOT_EXACT"},
	{err: manager.ErrFileMissing, code: codes.FailedPrecondition, reason: "FILE_MISSING"},
	// What a create's token ended with is final, so a repeat would not help.
	{err: manager.ErrCreateAborted, code: codes.Aborted, reason: "CREATE_ABORTED"},
	{err: manager.ErrCatalogCompacted, code: codes.Aborted, reason: "CATALOG_COMPACTED", retry: time.Second},
	{err: manager.ErrStoreNotFound, code: codes.NotFound, reason: "STORE_NOT_FOUND"},
	{err: manager.ErrEventsCompacted, code: codes.OutOfRange, reason: "EVENTS_COMPACTED"},
	{
		err: manager.ErrNotReady, code: codes.Unavailable, reason: "STORE_UNAVAILABLE", retry: time.Second,
		text: "the object store has not answered since this replica started: it changes nothing until it does; nothing was written, call again",
	},
	{err: manager.ErrStopping, code: codes.Unavailable, reason: "STOPPING", retry: time.Second},
	{err: manager.ErrOverloaded, code: codes.ResourceExhausted, reason: "OVERLOADED", retry: time.Second},
	// The caller has to look at what there is now.
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
	// Those who watch deal with it; a call that is made again reads again.
	{err: meta.ErrWatchBroken, code: codes.Aborted, reason: "CATALOG_COMPACTED", retry: time.Second},
	{err: record.ErrUnreadable, code: codes.DataLoss, reason: "RECORD_UNREADABLE"},
	{err: manifest.ErrNewerFormat, code: codes.FailedPrecondition, reason: "FORMAT_TOO_NEW"},
	{
		err: meta.ErrTooOld, code: codes.FailedPrecondition, reason: "METADATA_STORE_TOO_OLD",
		text: "the metadata store is older than snapshotd works with; its log says which server, and what is needed",
	},
	{
		err: meta.ErrDenied, code: codes.FailedPrecondition, reason: "METADATA_STORE_DENIED",
		text: "the metadata store denies access to snapshotd; its log says for what",
	},
	{
		err: meta.ErrCorrupt, code: codes.DataLoss, reason: "METADATA_STORE_CORRUPT",
		text: "the metadata store has found its data damaged, and serves nothing until an operator has mended it; its log says more",
	},
	{
		err: meta.ErrNoSpace, code: codes.ResourceExhausted, reason: "STORE_FULL",
		text: "the metadata store is full and takes nothing new: drop what is not needed; its log says more",
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
		text: "the object store denies access to snapshotd; its log says what to grant",
	},
	{
		err: object.ErrMisconfigured, code: codes.FailedPrecondition, reason: "OBJECT_STORE_MISCONFIGURED",
		text: "the object store is not what snapshotd's configuration says; its log says what differs",
	},
	{
		err: object.ErrUnavailable, code: codes.Unavailable, reason: "STORE_UNAVAILABLE", retry: time.Second,
		text: "the object store did not answer; a write may have happened: repeat the call with the same request_token",
	},
	{
		err: context.DeadlineExceeded, code: codes.DeadlineExceeded, reason: "DEADLINE_EXCEEDED",
		text: "the deadline ended before the call did; a write may have happened: repeat the call with the same request_token",
	},
	{
		err: context.Canceled, code: codes.Canceled, reason: "CANCELED",
		text: "the caller gave up; a write may have happened: repeat the call with the same request_token",
	},
}

// answer is an error as a client gets it. Only errors of this type pass toAnswer
// as they are: any other that carries a status came from a client of a store,
// and would tell ours to repeat what may have happened.
type answer struct {
	status *status.Status
	reason string
	// cause is the true error, for the log.
	cause error
}

func (a *answer) Error() string              { return a.status.Message() }
func (a *answer) GRPCStatus() *status.Status { return a.status }
func (a *answer) Unwrap() error              { return a.cause }

// toAnswer turns any error into what the client is told. An error that nobody
// classified may hold internals, so the client gets none of its text, but the
// id under which the log has it.
func toAnswer(err error, requestID string) *answer {
	if a, ok := err.(*answer); ok { //nolint:errorlint // one that is wrapped was not meant as the answer
		return a
	}
	if invalid, ok := errors.AsType[*protovalidate.ValidationError](err); ok {
		return invalidRequest(err, violations(invalid))
	}
	for _, c := range classes {
		if !errors.Is(err, c.err) {
			continue
		}
		text := c.text
		if text == "" {
			text = err.Error()
		}
		if c.err == catalog.ErrInvalid { //nolint:errorlint // the row, not the error
			var fields []*errdetails.BadRequest_FieldViolation
			if invalid, ok := errors.AsType[*catalog.InvalidError](err); ok {
				fields = append(fields, &errdetails.BadRequest_FieldViolation{Field: invalid.Field, Description: clip(invalid.Problem)})
			}
			return invalidRequest(err, fields)
		}
		if full, ok := errors.AsType[*object.FullError](err); ok && c.err == object.ErrFull { //nolint:errorlint // the row
			text = full.Error() + "; free space there or enlarge it, then call again with a new request_token"
		}
		var details []protoadapt.MessageV1
		if c.code == codes.FailedPrecondition {
			details = append(details, &errdetails.PreconditionFailure{Violations: []*errdetails.PreconditionFailure_Violation{
				{Type: c.reason, Description: clip(text)},
			}})
		}
		if c.retry > 0 {
			details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(c.retry)})
		}
		return newAnswer(err, c.code, c.reason, text, details...)
	}
	return newAnswer(err, codes.Internal, "INTERNAL", "internal error; the server's log has it under request id "+requestID)
}

func newAnswer(cause error, code codes.Code, reason, text string, details ...protoadapt.MessageV1) *answer {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: domain}
	var st *status.Status
	for _, fit := range fits {
		st = status.New(code, record.Clip(text, fit.text))
		all := []protoadapt.MessageV1{info}
		for _, d := range details {
			all = append(all, clipDetail(d, fit.detail, fit.violations))
		}
		if full, err := st.WithDetails(all...); err == nil {
			st = full
		}
		if trailerBytes(st) <= maxTrailer {
			break
		}
	}
	return &answer{status: st, reason: reason, cause: cause}
}

// clipDetail returns a detail of an error with texts of at most so many bytes, and no
// more violations than that.
func clipDetail(d protoadapt.MessageV1, most, violations int) protoadapt.MessageV1 {
	switch d := d.(type) {
	case *errdetails.BadRequest:
		out := &errdetails.BadRequest{}
		for _, v := range d.GetFieldViolations()[:min(len(d.GetFieldViolations()), violations)] {
			out.FieldViolations = append(out.FieldViolations, &errdetails.BadRequest_FieldViolation{
				Field: record.Clip(v.GetField(), most), Description: record.Clip(v.GetDescription(), most),
			})
		}
		return out
	case *errdetails.PreconditionFailure:
		out := &errdetails.PreconditionFailure{}
		for _, v := range d.GetViolations() {
			out.Violations = append(out.Violations, &errdetails.PreconditionFailure_Violation{
				Type: v.GetType(), Subject: v.GetSubject(), Description: record.Clip(v.GetDescription(), most),
			})
		}
		return out
	}
	return d
}

// trailerBytes is how many bytes a status takes in the trailers: its text, with each byte
// that is not printable as three, and all of it once more in base64.
func trailerBytes(st *status.Status) int {
	size := base64.StdEncoding.EncodedLen(proto.Size(st.Proto()))
	for _, b := range []byte(st.Message()) {
		if size++; b < ' ' || b > '~' || b == '%' {
			size += 2
		}
	}
	return size
}

func invalidRequest(cause error, fields []*errdetails.BadRequest_FieldViolation) *answer {
	text := cause.Error()
	if len(fields) > 0 {
		var parts []string
		for _, f := range fields {
			parts = append(parts, strings.TrimPrefix(record.Clip(f.GetField(), maxFieldText)+": "+f.GetDescription(), ": "))
		}
		text = strings.Join(parts, "; ")
	}
	return newAnswer(cause, codes.InvalidArgument, "INVALID_REQUEST", "invalid request: "+text,
		&errdetails.BadRequest{FieldViolations: fields})
}

// maxFieldText bounds the name of a field in an error, in bytes: it has the keys of maps.
const maxFieldText = 256

// violations are the first of those that a validation found.
func violations(err *protovalidate.ValidationError) []*errdetails.BadRequest_FieldViolation {
	var list []*errdetails.BadRequest_FieldViolation
	for _, v := range err.Violations[:min(len(err.Violations), maxViolations)] {
		text := v.Proto.GetMessage()
		if v.Proto.GetRuleId() == "string.pattern" && v.RuleValue.IsValid() && v.RuleValue.String() == catalog.NamePattern {
			text = "is not a name: 1 to 255 of A-Z a-z 0-9 _ . - are, and the first is not . or -"
		}
		list = append(list, &errdetails.BadRequest_FieldViolation{
			Field: record.Clip(protovalidate.FieldPathString(v.Proto.GetField()), maxFieldText), Description: clip(text),
		})
	}
	return list
}

// fromStream turns gRPC's own error of a stream into an answer. When a message
// could not be received gRPC has sent its status already, without a reason.
func fromStream(err error) error {
	switch status.Code(err) {
	case codes.ResourceExhausted:
		return toAnswer(errTooLarge, "")
	case codes.Canceled:
		return toAnswer(context.Canceled, "")
	case codes.DeadlineExceeded:
		return toAnswer(context.DeadlineExceeded, "")
	default:
		return &answer{status: status.Convert(err), cause: err}
	}
}

// clip bounds a text and makes it UTF-8, without which no message could be
// encoded.
func clip(s string) string { return record.Clip(s, maxMessageText) }
