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

// The exit codes; the root command's help promises them.
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

// usageError is a mistake in how the program was called.
type usageError struct {
	err     error
	command string // the command whose help says how
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func asUsageError(cmd *cobra.Command, err error) error {
	if _, ok := errors.AsType[*usageError](err); ok {
		return err
	}
	return &usageError{err: err, command: cmd.CommandPath()}
}

// wrong is a mistake in an argument or flag of the command that runs.
func usageErrorf(format string, args ...any) error {
	return &usageError{err: fmt.Errorf(format, args...)}
}

// hintError is an error with advice better than its reason gives.
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
		vs = nil // the message has said it
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

// describe returns what an error says, and the status code in it; Unknown when
// there is none.
func errorText(err error) (string, codes.Code) {
	if s, ok := errors.AsType[statusError](err); ok {
		st := s.GRPCStatus()
		text := st.Message()
		switch {
		case st.Code() == codes.DeadlineExceeded && text == context.DeadlineExceeded.Error(),
			// The server may notice the deadline first, and reset the stream.
			strings.Contains(text, "RST_STREAM with error code: CANCEL"):
			text = "no answer in time"
		case st.Code() == codes.Unavailable:
			text = dialError.ReplaceAllString(text, "$1")
		}
		// What wraps the status stays; what gRPC writes before it does not.
		return strings.Replace(err.Error(), s.Error(), text, 1), st.Code()
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return strings.Replace(err.Error(), context.DeadlineExceeded.Error(), "no answer in time", 1), codes.DeadlineExceeded
	}
	return err.Error(), codes.Unknown
}

// dialError is how gRPC says that it cannot connect, with the reason within.
var dialError = regexp.MustCompile(`^connection error: desc = "(?:transport: )?(?:Error while dialing: )?(.*)"$`)

// tlsTrouble is what connecting fails with when one side speaks TLS and the other
// does not, or when they do not trust each other. What wants TLS hangs up on
// plaintext, at one moment or another.
var tlsFailure = regexp.MustCompile(`error reading server preface|broken pipe|tls: |x509: |certificate`)

// notTLS is what a TLS client is told by a server that does not speak it.
const plaintextReply = "first record does not look like a TLS handshake"

type statusError interface {
	error
	GRPCStatus() *status.Status
}

// hint returns what to do about an error; empty: nothing in particular.
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
		return strings.NewReplacer("SNAPSHOT", shellQuote(a.snapshot, "SNAPSHOT"), "COLLECTION", shellQuote(a.collection, "COLLECTION")).Replace(h)
	}
	switch code {
	case codes.Unavailable:
		switch text, _ := errorText(err); {
		case strings.Contains(text, plaintextReply):
			return fmt.Sprintf("the server at %s may speak plaintext: leave out --tls, --tls-ca, --tls-cert and --tls-key, and their variables", clean(a.addr))
		case tlsFailure.MatchString(text):
			return "the server may want TLS: see --tls-ca, --tls-cert, --tls-key"
		}
		return fmt.Sprintf("is snapshotd running at %s? --addr or SNAPSHOTCTL_ADDR names another server", clean(a.addr))
	case codes.DeadlineExceeded:
		return fmt.Sprintf("is snapshotd running well at %s? --timeout gives it longer", clean(a.addr))
	case codes.Unimplemented:
		return fmt.Sprintf("the server at %s may be older than this snapshotctl: compare `snapshotctl info` and `snapshotctl version`", clean(a.addr))
	default:
		return ""
	}
}

// word returns s as one word of a shell command, or what to call it when it is
// not known.
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

// hints says what to do about an error of each reason. SNAPSHOT and COLLECTION
// stand for what the user named.
var hints = map[string]string{
	"CATALOG_COMPACTED":          "the catalog changed faster than it could be read; run the command again",
	"CHANNEL_MISMATCH":           "give --channel as often as the snapshot has channels, or not at all; see them with `snapshotctl snapshot describe SNAPSHOT`",
	"CHECKPOINT_MISSING":         "see which channel lacks one with `snapshotctl catalog get COLLECTION`, and set it with `snapshotctl catalog set-checkpoint --collection COLLECTION SHARD=TIMESTAMP`",
	"CHECKPOINT_REGRESSION":      "a checkpoint only moves forward; see them with `snapshotctl catalog get COLLECTION`",
	"CLOCK_UNTRUSTED":            "set the clocks of the server and of its object store right, then run `snapshotctl recover --clock`",
	"COLLECTION_EXISTS":          "see it with `snapshotctl catalog get COLLECTION`, or choose another name",
	"COLLECTION_MISMATCH":        "the name stands for another collection by now; see it with `snapshotctl catalog get COLLECTION`",
	"COLLECTION_NOT_ACTIVE":      "see its state with `snapshotctl catalog get COLLECTION`",
	"COLLECTION_NOT_FOUND":       "see which there are with `snapshotctl catalog collections`; one outside the database \"default\" is written DB/NAME",
	"CONFLICT":                   "others changed the same things; nothing was written: run the command again",
	"CREATE_ABORTED":             "run the command again, without --request-token or with a new one",
	"CUT_NOT_REACHED":            "see the checkpoints with `snapshotctl catalog get COLLECTION`, and wait longer with --timeout",
	"EVENTS_COMPACTED":           "see what there is with `snapshotctl snapshot list` and `snapshotctl catalog collections`, and go on without --resume-token",
	"EXPIRED_OR_DROPPED":         "see which snapshots there are with `snapshotctl snapshot list --state pending,committed,deleting`",
	"FILE_MISSING":               "a file that the catalog lists is not in the object store as it should be; compare with `snapshotctl catalog export --collection COLLECTION`",
	"FORMAT_TOO_NEW":             "a newer snapshotd wrote it: upgrade the server",
	"ID_NOT_ALLOCATED":           "get ids with `snapshotctl catalog allocate-ids COUNT`, or reserve an engine's own with `snapshotctl catalog allocate-ids COUNT --reserve FIRST`, which needs allow_reserve_ids at the server",
	"ID_OWNED":                   "an id is of one collection for ever; get new ones with `snapshotctl catalog allocate-ids COUNT`",
	"ID_USED":                    "it stood for a segment or an index build whose files are deleted; get new ones with `snapshotctl catalog allocate-ids COUNT`",
	"ID_RANGE_TAKEN":             "choose another range, or take what is free with `snapshotctl catalog allocate-ids COUNT`",
	"INDEX_NOT_FOUND":            "see which there are with `snapshotctl catalog get COLLECTION`",
	"INVALID_RESUME_TOKEN":       "a token is good for the cluster and the --collection that it was given for; go on without --resume-token",
	"STORE_NOT_FOUND":            "see which there are with `snapshotctl info`",
	"KEY_NOT_FOUND":              "a key begins with /, without the cluster's root, as in `snapshotctl debug get /snapshot/rec/42`",
	"LAYOUT_REFUSED":             "the file that the message names is not where the collection's layout wants it; --partition or --skip-indexes may leave it out",
	"LIMIT_EXCEEDED":             "see what there is with `snapshotctl catalog get COLLECTION`",
	"MESSAGE_TOO_LARGE":          "a message takes 4 MiB: send fewer things at a time; an answer above that comes from a server that is older than this snapshotctl",
	"METADATA_BEHIND":            "the metadata store is older than what it wrote into the object store, as after it was restored from a backup; when that is so, `snapshotctl recover` lets it go on",
	"NEVER_EXISTED":              "see which snapshots there are with `snapshotctl snapshot list`",
	"NOT_EXACT":                  "wait for the data plane to flush, or leave out --require-exact: segments across the cut then get a row ceiling",
	"METADATA_STORE_CORRUPT":     "etcd has raised its alarm CORRUPT: see `etcdctl alarm list`, and replace the member that differs from the others",
	"METADATA_STORE_DENIED":      "etcd denies the server access: see Security in docs/operations.md for the role that its user needs",
	"METADATA_STORE_TOO_OLD":     "the server met an etcd that is too old to be used; its log says where, docs/operations.md from which release on",
	"OBJECT_STORE_DENIED":        "the object store denies the server access; the server's log says for what",
	"OBJECT_STORE_MISCONFIGURED": "the object store is not what the server's configuration says; the server's log says what differs",
	"OVERLOADED":                 "run the command again in a while",
	"ROOT_NESTED":                "give the collection the very root of the other one, or one that lies apart from it",
	"PLACE_OWNED":                "write the file under COLLECTION/PARTITION/SEGMENT/ with the ids of its own collection and segment, and register that path",
	"PARTITION_NOT_FOUND":        "see which there are with `snapshotctl catalog get COLLECTION`",
	"PERMISSION_DENIED":          "this server does not let you: see which it is with `snapshotctl info`",
	"PIN_HAS_NO_TTL":             "it lasts until it is removed; see it with `snapshotctl pin list SNAPSHOT`",
	"PIN_NOT_FOUND":              "see which there are with `snapshotctl pin list SNAPSHOT`, and whether the snapshot is still there with `snapshotctl snapshot get SNAPSHOT`",
	"PIN_OF_RESTORE":             "it goes when the job ends; see which that is with `snapshotctl restore list`, and give it up with `snapshotctl restore cancel JOB`",
	"REFERENCES_LOADING":         "the server is still reading what snapshots reference; run the command again in a while",
	"REFERENCES_UNREADABLE":      "nothing of the collection is reclaimed until the snapshot that the message names can be read again, or is dropped; see it with `snapshotctl snapshot get '#ID'`",
	"REQUEST_TOKEN_REUSED":       "leave out --request-token for a new request; a token repeats only the very same one",
	"RESERVE_NOT_ALLOWED":        "start the server with --allow-reserve-ids, or take new ids with `snapshotctl catalog allocate-ids COUNT`",
	"RESTORE_ENDED":              "see how with `snapshotctl restore status JOB`; what it has made is undone with `snapshotctl catalog drop-collection COLLECTION`",
	"RESTORE_NOT_FOUND":          "see which there are with `snapshotctl restore list`",
	"REVISION_CHANGED":           "somebody else changed it in the meantime; look at it and run the command again",
	"SEGMENT_EXISTS":             "an id is never used twice; get new ones with `snapshotctl catalog allocate-ids COUNT`",
	"SEGMENT_NOT_FOUND":          "see which there are with `snapshotctl catalog export --collection COLLECTION`",
	"SNAPSHOT_CORRUPT":           "its own files in the object store are missing or altered; see where they lie with `snapshotctl debug get /snapshot/rec/ID`",
	"SNAPSHOT_EXISTS":            "choose another name, or see the one that has it with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_MISMATCH":          "the name stands for another snapshot by now; see it with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_NOT_COMMITTED":     "see its state with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_NOT_FOUND":         "see which there are with `snapshotctl snapshot list`; '#42' and --id 42 mean an id, 42 a name",
	"SNAPSHOT_PENDING":           "it is still being created; see how it is with `snapshotctl snapshot get SNAPSHOT`",
	"SNAPSHOT_PINNED":            "see who keeps it with `snapshotctl pin list SNAPSHOT`; remove a pin that nobody needs with `snapshotctl pin remove SNAPSHOT PIN_ID`",
	"STOPPING":                   "the server is about to stop; run the command again",
	"STORE_FULL":                 "the message says which store is full; enlarge it, or drop snapshots that are not needed: see `snapshotctl snapshot list`",
	"STORE_UNAVAILABLE":          "the server runs, but its metadata or object store did not answer; run the command again when it does",
	"UNAUTHENTICATED":            "present a certificate that names you, with --tls-cert and --tls-key",
}
