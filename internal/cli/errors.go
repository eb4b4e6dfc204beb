package cli

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/snapshotd/snapshotd/client"
)

// The exit codes, as documented in the root command's help.
const (
	exitOK           = 0
	exitOther        = 1
	exitUsage        = 2
	exitNotFound     = 3
	exitExists       = 4
	exitPrecondition = 5
	exitUnavailable  = 6
	exitAborted      = 7
	exitExhausted    = 8
)

// usageError is an error in flags or arguments.
type usageError struct {
	err     error
	command string // the command that --help is suggested for
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func asUsageError(cmd *cobra.Command, err error) error {
	if _, ok := errors.AsType[*usageError](err); ok {
		return err
	}
	return &usageError{err: err, command: cmd.CommandPath()}
}

// usageErrorf returns a usage error of the running command.
func usageErrorf(format string, args ...any) error {
	return &usageError{err: fmt.Errorf(format, args...)}
}

// hintError is an error with a hint that replaces the one for its reason.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// report prints an error and returns the exit code.
func (a *app) report(ctx context.Context, err error) int {
	if ctx.Err() != nil {
		fprintf(a.err, "error: interrupted\n")
		if h, ok := errors.AsType[*hintError](err); ok {
			fprintf(a.err, "hint: %s\n", h.hint)
		}
		return exitOther
	}
	text, code := errorText(err)
	fprintf(a.err, "error: %s\n", clean(text))
	vs := client.Violations(err)
	if len(vs) == 1 && strings.Contains(text, vs[0].Description) && strings.Contains(text, vs[0].Field) {
		vs = nil // already in the message
	}
	for _, v := range vs {
		if v.Field == "" { // the request as a whole
			fprintf(a.err, "  %s\n", clean(v.Description))
			continue
		}
		fprintf(a.err, "  %s: %s\n", clean(v.Field), clean(v.Description))
	}
	reason := client.Reason(err)
	if reason != "" {
		fprintf(a.err, "reason: %s\n", clean(reason))
	}
	if hint := a.hint(err, code, reason); hint != "" {
		fprintf(a.err, "hint: %s\n", hint)
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	switch code {
	case codes.InvalidArgument:
		return exitUsage
	case codes.NotFound:
		return exitNotFound
	case codes.AlreadyExists:
		return exitExists
	case codes.FailedPrecondition:
		return exitPrecondition
	case codes.Unavailable, codes.DeadlineExceeded:
		return exitUnavailable
	case codes.Aborted:
		return exitAborted
	case codes.ResourceExhausted:
		return exitExhausted
	default:
		return exitOther
	}
}

// errorText returns the text of an error and its status code, Unknown if it has
// none.
func errorText(err error) (string, codes.Code) {
	if s, ok := errors.AsType[statusError](err); ok {
		st := s.GRPCStatus()
		text := st.Message()
		switch {
		case st.Code() == codes.DeadlineExceeded && text == context.DeadlineExceeded.Error(),
			// The server may notice the deadline first, and reset the stream.
			strings.Contains(text, "RST_STREAM with error code: CANCEL"):
			text = "no response in time"
		case st.Code() == codes.Unavailable:
			text = dialError.ReplaceAllString(text, "$1")
		}
		// Text that wraps the status stays; gRPC's own prefix goes.
		return strings.Replace(err.Error(), s.Error(), text, 1), st.Code()
	}
	if errors.Is(err, context.DeadlineExceeded) {
		text := strings.Replace(err.Error(), context.DeadlineExceeded.Error(), "no response in time", 1)
		return text, codes.DeadlineExceeded
	}
	return err.Error(), codes.Unknown
}

// dialError matches gRPC's connection errors; the group is the cause.
var dialError = regexp.MustCompile(`^connection error: desc = "(?:transport: )?(?:Error while dialing: )?(.*)"$`)

// tlsFailure matches connection errors of a TLS mismatch: only one side speaks TLS,
// or they do not trust each other. A TLS server may hang up on plaintext early or late.
var tlsFailure = regexp.MustCompile(`error reading server preface|broken pipe|tls: |x509: |certificate`)

// plaintextReply is a TLS client's error when the server replies in plaintext.
const plaintextReply = "first record does not look like a TLS handshake"

type statusError interface {
	error
	GRPCStatus() *status.Status
}

// hint returns advice about an error; empty if there is none.
func (a *app) hint(err error, code codes.Code, reason string) string {
	if h, ok := errors.AsType[*hintError](err); ok {
		return h.hint
	}
	if u, ok := errors.AsType[*usageError](err); ok {
		if u.command == "" {
			return ""
		}
		return fmt.Sprintf("see `%s --help`", u.command)
	}
	if h, ok := hints[reason]; ok {
		snapshot, collection := shellQuote(a.snapshot, "SNAPSHOT"), shellQuote(a.collection, "COLLECTION")
		return strings.NewReplacer("SNAPSHOT", snapshot, "COLLECTION", collection).Replace(h)
	}
	switch code {
	case codes.Unavailable:
		switch text, _ := errorText(err); {
		case strings.Contains(text, plaintextReply):
			return fmt.Sprintf("the server at %s may speak plaintext: omit --tls, --tls-ca, --tls-cert and --tls-key, "+
				"and their variables", clean(a.addr))
		case tlsFailure.MatchString(text):
			return "the server may want TLS: see --tls-ca, --tls-cert, --tls-key"
		}
		return fmt.Sprintf("is snapshotd running at %s? --addr or SNAPSHOTCTL_ADDR names another server", clean(a.addr))
	case codes.DeadlineExceeded:
		return fmt.Sprintf("is snapshotd healthy at %s? --timeout allows more time", clean(a.addr))
	case codes.Unimplemented:
		return fmt.Sprintf("the server at %s may be older than this snapshotctl: "+
			"compare `snapshotctl info` and `snapshotctl version`", clean(a.addr))
	default:
		return ""
	}
}

// shellQuote returns s as one word of a shell command, or unknown if s is empty.
func shellQuote(s, unknown string) string {
	switch {
	case s == "":
		return unknown
	case strings.ContainsFunc(s, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-/", r)
	}):
		return "'" + strings.ReplaceAll(clean(s), "'", `'\''`) + "'"
	}
	return s
}

// hints has the advice for the reason of an error. The words SNAPSHOT and COLLECTION
// are replaced by the names that the user gave.
var hints = map[string]string{
	"CATALOG_COMPACTED": "the catalog changed too fast to be read; run the command again",
	"CHANNEL_MISMATCH": "use --channel once per channel of the snapshot, or not at all; list them with " +
		"`snapshotctl snapshot describe SNAPSHOT`",
	"CHECKPOINT_MISSING": "see which channel lacks one with `snapshotctl catalog get COLLECTION`, and set " +
		"it with `snapshotctl catalog set-checkpoint --collection COLLECTION SHARD=TIMESTAMP`",
	"CHECKPOINT_REGRESSION": "a checkpoint only moves forward; list them with `snapshotctl catalog get COLLECTION`",
	"CLOCK_UNTRUSTED": "correct the clocks of the server and of its object store, then run `snapshotctl recover " +
		"--clock`",
	"COLLECTION_EXISTS": "see it with `snapshotctl catalog get COLLECTION`, or choose another name",
	"COLLECTION_MISMATCH": "the name now belongs to another collection; see it with `snapshotctl catalog get " +
		"COLLECTION`",
	"COLLECTION_NOT_ACTIVE": "see its state with `snapshotctl catalog get COLLECTION`",
	"COLLECTION_NOT_FOUND": "list the collections with `snapshotctl catalog collections`; outside the " +
		"database \"default\" use DB/NAME",
	"CONFLICT":        "a concurrent change; nothing was written: run the command again",
	"CREATE_ABORTED":  "run the command again, without --request-token or with a new one",
	"CUT_NOT_REACHED": "see the checkpoints with `snapshotctl catalog get COLLECTION`, and wait longer with --timeout",
	"EVENTS_COMPACTED": "list the current state with `snapshotctl snapshot list` and `snapshotctl " +
		"catalog collections`, and continue without --resume-token",
	"EXPIRED_OR_DROPPED": "list the snapshots with `snapshotctl snapshot list --state pending,committed,deleting`",
	"FILE_MISSING": "a file of the catalog is missing or altered in the object store; compare with `snapshotctl catalog " +
		"export --collection COLLECTION`",
	"FORMAT_TOO_NEW": "a newer snapshotd wrote it: upgrade the server",
	"ID_NOT_ALLOCATED": "allocate ids with `snapshotctl catalog allocate-ids COUNT`, or reserve an engine's own with " +
		"`snapshotctl catalog allocate-ids COUNT --reserve FIRST`, which requires allow_reserve_ids at the " +
		"server",
	"ID_OWNED": "an id belongs to one collection forever; allocate new ones with `snapshotctl catalog allocate-ids " +
		"COUNT`",
	"ID_RANGE_TAKEN": "choose another range, or allocate free ids with `snapshotctl catalog allocate-ids COUNT`",
	"ID_USED": "it was the id of a segment or an index build whose files are deleted; allocate new ones with " +
		"`snapshotctl catalog allocate-ids COUNT`",
	"INDEX_NOT_FOUND": "list the indexes with `snapshotctl catalog get COLLECTION`",
	"INVALID_RESUME_TOKEN": "a token is valid for the cluster and the --collection that it was issued for; " +
		"continue without --resume-token",
	"KEY_NOT_FOUND": "a key starts with / and omits the cluster's root, as in `snapshotctl debug get /snapshot/rec/42`",
	"LAYOUT_REFUSED": "the file that the message names does not match the collection's layout; --partition or " +
		"--skip-indexes may omit it",
	"LIMIT_EXCEEDED": "see the current contents with `snapshotctl catalog get COLLECTION`",
	"MESSAGE_TOO_LARGE": "a request is limited to 4 MiB: send fewer items per request; a larger response " +
		"comes from a server older than this snapshotctl",
	"METADATA_BEHIND": "the metadata store is older than its heartbeats in the object store, as after a restore from a " +
		"backup; if it was restored, `snapshotctl recover` unblocks it",
	"METADATA_STORE_CORRUPT": "etcd has raised its alarm CORRUPT: see `etcdctl alarm list`, and replace the " +
		"member that differs from the others",
	"METADATA_STORE_DENIED": "etcd denies the server access: see Security in docs/operations.md for the role " +
		"that its user needs",
	"METADATA_STORE_TOO_OLD": "the server uses an etcd release that is too old; its log names the endpoint, " +
		"docs/operations.md the minimum release",
	"NEVER_EXISTED": "list the snapshots with `snapshotctl snapshot list`",
	"NOT_EXACT": "wait for the data plane to flush, or omit --require-exact: segments across the cut then get a row " +
		"ceiling",
	"OBJECT_STORE_DENIED": "the object store denies the server access; the server's log names the operation",
	"OBJECT_STORE_MISCONFIGURED": "the object store does not match the server's configuration; the server's log " +
		"names the difference",
	"OVERLOADED":          "run the command again later",
	"PARTITION_NOT_FOUND": "list the partitions with `snapshotctl catalog get COLLECTION`",
	"PERMISSION_DENIED":   "this server denies you the call: see which server it is with `snapshotctl info`",
	"PIN_HAS_NO_TTL":      "it lasts until it is removed; see it with `snapshotctl pin list SNAPSHOT`",
	"PIN_NOT_FOUND": "list the pins with `snapshotctl pin list SNAPSHOT`, and check that the snapshot still exists with " +
		"`snapshotctl snapshot get SNAPSHOT`",
	"PIN_OF_RESTORE": "it is removed when the job ends; find the job with `snapshotctl restore list`, " +
		"and cancel it with `snapshotctl restore cancel JOB`",
	"PLACE_OWNED": "write the file under COLLECTION/PARTITION/SEGMENT/ with the ids of its own collection and segment, " +
		"and register that path",
	"REFERENCES_LOADING": "the server is still loading the references of snapshots; run the command again later",
	"REFERENCES_UNREADABLE": "nothing of the collection is reclaimed until the snapshot that the message " +
		"names is readable again or dropped; see it with `snapshotctl snapshot get '#ID'`",
	"REQUEST_TOKEN_REUSED": "omit --request-token for a new request; a token repeats only the identical request",
	"RESERVE_NOT_ALLOWED": "start the server with --allow-reserve-ids, or allocate new ids with `snapshotctl catalog " +
		"allocate-ids COUNT`",
	"RESTORE_ENDED": "see the result with `snapshotctl restore status JOB`; undo it with `snapshotctl catalog " +
		"drop-collection COLLECTION`",
	"RESTORE_NOT_FOUND": "list the jobs with `snapshotctl restore list`",
	"REVISION_CHANGED":  "it was changed concurrently; check it and run the command again",
	"ROOT_NESTED":       "use exactly the root of the other collection, or one that does not overlap it",
	"SEGMENT_EXISTS":    "an id is never reused; allocate new ones with `snapshotctl catalog allocate-ids COUNT`",
	"SEGMENT_NOT_FOUND": "list the segments with `snapshotctl catalog export --collection COLLECTION`",
	"SNAPSHOT_CORRUPT": "its own files in the object store are missing or altered; see their place with " +
		"`snapshotctl debug get /snapshot/rec/ID`",
	"SNAPSHOT_EXISTS":        "choose another name, or see the existing one with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_MISMATCH":      "the name now belongs to another snapshot; see it with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_NOT_COMMITTED": "see its state with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_NOT_FOUND": "list the snapshots with `snapshotctl snapshot list`; '#42' and --id 42 mean an id, 42 " +
		"a name",
	"SNAPSHOT_PENDING": "it is still being created; see its state with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_PINNED": "list its pins with `snapshotctl pin list SNAPSHOT`; remove a pin no longer " +
		"needed with `snapshotctl pin remove SNAPSHOT PIN_ID`",
	"STOPPING": "the server is stopping; run the command again",
	"STORE_FULL": "the message names the full store; enlarge it, or drop snapshots that are not needed: see " +
		"`snapshotctl snapshot list`",
	"STORE_NOT_FOUND": "list the stores with `snapshotctl info`",
	"STORE_UNAVAILABLE": "the server runs, but its metadata or object store did not respond; run the " +
		"command again when it does",
	"UNAUTHENTICATED": "use a client certificate with your name, with --tls-cert and --tls-key",
}
