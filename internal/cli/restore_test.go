package cli_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// WatchRestore sends the answers up to the first error, or all of them.
func (s *server) WatchRestore(
	req *snapshotdv1.WatchRestoreRequest, stream grpc.ServerStreamingServer[snapshotdv1.WatchRestoreResponse],
) error {
	for {
		s.mu.Lock()
		left := len(s.answers["WatchRestore"])
		s.mu.Unlock()
		msg, err := s.next("WatchRestore", req)
		if err != nil {
			return err
		}
		err = stream.Send(&snapshotdv1.WatchRestoreResponse{Job: msg.(*snapshotdv1.RestoreJob)})
		if err != nil || left <= 1 {
			return err
		}
	}
}

// executing returns a job halfway.
func executing() *snapshotdv1.RestoreJob {
	return &snapshotdv1.RestoreJob{
		Id: 65, SnapshotId: 42, SnapshotName: "nightly", SourceCollectionId: 7,
		Target: &snapshotdv1.CollectionInfo{Id: 66, Db: "default", Name: "docs_copy"},
		State:  snapshotdv1.RestoreJob_STATE_EXECUTING, Phase: snapshotdv1.RestoreJob_PHASE_COPY,
		Progress: &snapshotdv1.RestoreProgress{
			SegmentsDone: 1, SegmentsTotal: 3, FilesDone: 6, FilesTotal: 12, BytesDone: 5 << 19, BytesTotal: 5 << 20,
			BytesPerSecond: 1 << 20, Remaining: durationpb.New(2500 * time.Millisecond), Fraction: 0.499, Retries: 1,
		},
		LastError: "the store\tdid not answer", WaitingSince: timestamppb.New(now.Add(2 * time.Second)),
		RefusedSince: timestamppb.New(now.Add(3 * time.Second)),
		CreateTime:   timestamppb.New(now), StartTime: timestamppb.New(now.Add(time.Second)),
		Deadline: timestamppb.New(now.Add(time.Hour)),
		Labels:   map[string]string{"b": "2", "a": "1"},
		Limits:   &snapshotdv1.RestoreLimits{RequestsPerSecond: 100, BytesPerSecond: 1 << 20},
	}
}

// ended returns a job that has ended.
func ended(state snapshotdv1.RestoreJob_State, reason, message string) *snapshotdv1.RestoreJob {
	job := executing()
	job.State, job.Reason, job.Message, job.LastError = state, reason, message, ""
	job.Labels, job.Limits, job.Deadline, job.WaitingSince, job.RefusedSince = nil, nil, nil, nil, nil
	job.EndTime = timestamppb.New(now.Add(3500 * time.Millisecond))
	p := job.GetProgress()
	p.BytesPerSecond, p.Remaining = 0, nil
	if job.Phase = snapshotdv1.RestoreJob_PHASE_ROLL_BACK; state == isCompleted {
		job.Phase = snapshotdv1.RestoreJob_PHASE_PUBLISH
		p.SegmentsDone, p.FilesDone, p.BytesDone, p.Fraction = p.GetSegmentsTotal(), p.GetFilesTotal(), p.GetBytesTotal(), 1
	}
	return job
}

const (
	isCompleted = snapshotdv1.RestoreJob_STATE_COMPLETED
	isFailed    = snapshotdv1.RestoreJob_STATE_FAILED
	isCanceled  = snapshotdv1.RestoreJob_STATE_CANCELED
)

// completedText is the output of a COMPLETED job.
const completedText = `
job:           65
state:         COMPLETED
phase:         publish
snapshot:      nightly (#42)
target:        default/docs_copy (#66)
done:          100%
segments:      3 of 3
files:         12 of 12
copied:        5.0 MiB of 5.0 MiB
rate:          0 B/s
time left:     -
limits:        -
task retries:  1
created:       2026-03-01T12:00:00Z
started:       2026-03-01T12:00:01Z
ended:         2026-03-01T12:00:03Z
deadline:      -
reason:        -
message:       -
last error:    -
waiting since: -
refused since: -
labels:        -
`

// executingText is the output of a job halfway.
const executingText = `
job:           65
state:         EXECUTING
phase:         copy
snapshot:      nightly (#42)
target:        default/docs_copy (#66)
done:          49%
segments:      1 of 3
files:         6 of 12
copied:        2.5 MiB of 5.0 MiB
rate:          1.0 MiB/s
time left:     3s
limits:        1.0 MiB/s, 100 requests/s
task retries:  1
created:       2026-03-01T12:00:00Z
started:       2026-03-01T12:00:01Z
ended:         -
deadline:      2026-03-01T13:00:00Z
reason:        -
message:       -
last error:    "the store\tdid not answer"
waiting since: 2026-03-01T12:00:02Z
refused since: 2026-03-01T12:00:03Z
labels:        a=1,b=2
`

func TestRestoreOutput(t *testing.T) {
	plan := func(conflicts, missing []string) *snapshotdv1.RestoreSnapshotResponse {
		return &snapshotdv1.RestoreSnapshotResponse{Plan: &snapshotdv1.RestorePlan{
			Segments: 3, Files: 12, Bytes: 5 << 20, Requests: 35, EstimatedTime: durationpb.New(70 * time.Millisecond),
			Conflicts: conflicts, Missing: missing, MissingCount: int64(len(missing)),
		}}
	}
	started := map[string][]any{
		"RestoreSnapshot": {&snapshotdv1.RestoreSnapshotResponse{JobId: 65, CollectionId: 66}},
		"WatchRestore":    {executing(), ended(isCompleted, "", "")},
	}
	list := map[string][]any{"ListRestoreJobs": {
		&snapshotdv1.ListRestoreJobsResponse{
			Jobs: []*snapshotdv1.RestoreJob{ended(isCanceled, "CANCELED", "it was canceled"), executing()}, NextPageToken: "2",
		},
		&snapshotdv1.ListRestoreJobsResponse{Jobs: []*snapshotdv1.RestoreJob{ended(isCompleted, "", "")}},
	}}
	for _, tc := range []struct {
		name    string
		answers map[string][]any
		args    string
		want    string
	}{
		{
			"plan",
			map[string][]any{"RestoreSnapshot": {plan(nil, nil)}},
			"restore plan nightly --to docs_copy",
			`
segments: 3
files:    12
to copy:  5.0 MiB
requests: about 35
takes:    about 100ms
missing files: none
no conflicts
`,
		},
		{
			"plan with conflicts",
			map[string][]any{"RestoreSnapshot": {plan(
				[]string{"collection exists: default/docs"}, []string{"default/engine/7/8/101/insert/100/1\n of segment 101", "x"},
			)}},
			"restore plan nightly --to docs",
			`
segments: 3
files:    12
to copy:  5.0 MiB
requests: about 35
takes:    about 100ms
missing files: 2
  "default/engine/7/8/101/insert/100/1\n of segment 101"
  x
conflict: collection exists: default/docs
`,
		},
		{
			"plan without a check of the files",
			map[string][]any{"RestoreSnapshot": {plan(nil, nil)}},
			"restore plan nightly --to docs_copy --no-verify",
			`
segments: 3
files:    12
to copy:  5.0 MiB
requests: about 35
takes:    about 100ms
missing files: not checked
no conflicts
`,
		},
		{
			"plan as JSON",
			map[string][]any{"RestoreSnapshot": {&snapshotdv1.RestoreSnapshotResponse{Plan: &snapshotdv1.RestorePlan{
				Segments: 3, Conflicts: []string{"no"},
			}}}},
			"restore plan nightly --to docs_copy -o json",
			`
{
  "plan": {
    "segments": "3",
    "conflicts": [
      "no"
    ]
  }
}
`,
		},
		{
			"start", started, "restore start nightly --to docs_copy",
			`
restore job 65 creates collection docs_copy (#66)
to watch: snapshotctl restore watch 65
to undo: snapshotctl restore cancel 65
`,
		},
		{
			"start as JSON", started, "restore start nightly --to docs_copy -o json",
			`
{
  "jobId": "65",
  "collectionId": "66"
}
`,
		},
		{"start and wait", started, "restore start nightly --to docs_copy --wait", completedText},
		{"watch", started, "restore watch 65", completedText},
		{
			"watch through a restart",
			map[string][]any{"WatchRestore": {
				executing(), status.Error(codes.Unavailable, "restart"), ended(isCompleted, "", ""),
			}},
			"restore watch 65", completedText,
		},
		{
			"watch as JSON",
			map[string][]any{"WatchRestore": {&snapshotdv1.RestoreJob{Id: 65, State: isCompleted}}},
			"restore watch 65 -o json",
			`
{
  "job": {
    "id": "65",
    "state": "STATE_COMPLETED"
  }
}
`,
		},
		{
			"status",
			map[string][]any{"GetRestoreState": {&snapshotdv1.GetRestoreStateResponse{Job: executing()}}},
			"restore status 65", executingText,
		},
		{
			"status as JSON",
			map[string][]any{"GetRestoreState": {&snapshotdv1.GetRestoreStateResponse{Job: &snapshotdv1.RestoreJob{
				Id: 65, State: isFailed, Reason: "TIMEOUT",
			}}}},
			"restore status 65 -o json",
			`
{
  "job": {
    "id": "65",
    "state": "STATE_FAILED",
    "reason": "TIMEOUT"
  }
}
`,
		},
		{
			"limit",
			map[string][]any{"UpdateRestore": {&snapshotdv1.UpdateRestoreResponse{Job: executing()}}},
			"restore limit 65 --max-rate 1MiB --max-requests 100", executingText,
		},
		{
			"list", list, "restore list",
			`
JOB  SNAPSHOT  TARGET             STATE      PHASE      DONE  FILES  SIZE     STARTED               TOOK  REASON
65   nightly   default/docs_copy  CANCELED   roll back  49%   12     5.0 MiB  2026-03-01T12:00:01Z  2.5s  CANCELED
65   nightly   default/docs_copy  EXECUTING  copy       49%   12     5.0 MiB  2026-03-01T12:00:01Z  -     -
65   nightly   default/docs_copy  COMPLETED  publish    100%  12     5.0 MiB  2026-03-01T12:00:01Z  2.5s  -
`,
		},
		{
			"list as JSON",
			map[string][]any{"ListRestoreJobs": {&snapshotdv1.ListRestoreJobsResponse{Jobs: []*snapshotdv1.RestoreJob{
				{Id: 65}, {Id: 64},
			}}}},
			"restore list -o json",
			`
{
  "jobs": [
    {
      "id": "65"
    },
    {
      "id": "64"
    }
  ]
}
`,
		},
		{
			"an empty list",
			map[string][]any{"ListRestoreJobs": {&snapshotdv1.ListRestoreJobsResponse{}}},
			"restore list",
			"\nJOB  SNAPSHOT  TARGET  STATE  PHASE  DONE  FILES  SIZE  STARTED  TOOK  REASON\n",
		},
		{
			"cancel",
			map[string][]any{"CancelRestore": {&snapshotdv1.CancelRestoreResponse{Job: &snapshotdv1.RestoreJob{
				Id: 65, State: snapshotdv1.RestoreJob_STATE_EXECUTING, Phase: snapshotdv1.RestoreJob_PHASE_ROLL_BACK,
				Target: &snapshotdv1.CollectionInfo{Db: "default", Name: "docs_copy"},
			}}}},
			"restore cancel 65",
			"\nrestore job 65 is EXECUTING, in phase roll back: default/docs_copy will not appear\n",
		},
		{
			"cancel as JSON",
			map[string][]any{"CancelRestore": {&snapshotdv1.CancelRestoreResponse{Job: &snapshotdv1.RestoreJob{
				Id: 65, State: isCanceled,
			}}}},
			"restore cancel 65 -o json",
			`
{
  "job": {
    "id": "65",
    "state": "STATE_CANCELED"
  }
}
`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := run(t, &server{answers: maps.Clone(tc.answers)}, "", strings.Fields(tc.args)...)
			// Only the result: there is no terminal to draw on.
			want := result{out: strings.TrimPrefix(tc.want, "\n")}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRestoreRequests(t *testing.T) {
	name := func(name string) *snapshotdv1.SnapshotRef {
		return &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Name{Name: name}}
	}
	none := &snapshotdv1.RestoreLimits{}
	for _, tc := range []struct {
		args string
		want proto.Message
	}{
		{
			"restore start nightly --to prod/docs --partition a --partition b --channel x-0 --channel x-1 --property ttl=60 " +
				"--property mmap= " +
				"--label why=test --skip-indexes --priority -5 --give-up-after 30d --max-requests 100 --max-rate 50MiB " +
				"--request-token t",
			&snapshotdv1.RestoreSnapshotRequest{
				Snapshot: name("nightly"), Target: &snapshotdv1.CollectionName{Db: "prod", Name: "docs"},
				Partitions: []string{"a", "b"},
				Channels:   []string{"x-0", "x-1"}, Properties: map[string]string{"ttl": "60", "mmap": ""},
				Labels:      map[string]string{"why": "test"},
				SkipIndexes: true, Priority: -5, Timeout: durationpb.New(30 * 24 * time.Hour), RequestToken: "t",
				Limits: &snapshotdv1.RestoreLimits{RequestsPerSecond: 100, BytesPerSecond: 50 << 20},
			},
		},
		{
			"restore start #42 --to docs --give-up-after 1s --max-rate 7 --request-token t",
			&snapshotdv1.RestoreSnapshotRequest{
				Snapshot: &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Id{Id: 42}},
				Target:   &snapshotdv1.CollectionName{Name: "docs"},
				Timeout:  durationpb.New(time.Second), RequestToken: "t", Limits: &snapshotdv1.RestoreLimits{BytesPerSecond: 7},
			},
		},
		{
			"restore plan nightly --to docs",
			&snapshotdv1.RestoreSnapshotRequest{
				Snapshot: name("nightly"), Target: &snapshotdv1.CollectionName{Name: "docs"}, Limits: none, DryRun: true,
				Verify: true,
			},
		},
		{
			"restore plan nightly --to docs --no-verify --max-rate 2GiB",
			&snapshotdv1.RestoreSnapshotRequest{
				Snapshot: name("nightly"), Target: &snapshotdv1.CollectionName{Name: "docs"},
				Limits: &snapshotdv1.RestoreLimits{BytesPerSecond: 2 << 30}, DryRun: true,
			},
		},
		{"restore status 65", &snapshotdv1.GetRestoreStateRequest{JobId: 65}},
		{"restore watch 65", &snapshotdv1.WatchRestoreRequest{JobId: 65}},
		{
			"restore list --db prod --snapshot-id 42 --state pending,executing --state Failed --label a=1 --limit 5",
			&snapshotdv1.ListRestoreJobsRequest{
				Db: "prod", SnapshotId: 42, Labels: map[string]string{"a": "1"}, PageSize: 5,
				States: []snapshotdv1.RestoreJob_State{
					snapshotdv1.RestoreJob_STATE_PENDING, snapshotdv1.RestoreJob_STATE_EXECUTING, isFailed,
				},
			},
		},
		{"restore limit 65", &snapshotdv1.UpdateRestoreRequest{JobId: 65, Limits: none}},
		{
			"restore limit 65 --max-rate 500KiB",
			&snapshotdv1.UpdateRestoreRequest{JobId: 65, Limits: &snapshotdv1.RestoreLimits{BytesPerSecond: 500 << 10}},
		},
		{"restore cancel 65", &snapshotdv1.CancelRestoreRequest{JobId: 65}},
	} {
		t.Run(tc.args, func(t *testing.T) {
			s := &server{answers: map[string][]any{
				"RestoreSnapshot": {&snapshotdv1.RestoreSnapshotResponse{JobId: 65}},
				"GetRestoreState": {&snapshotdv1.GetRestoreStateResponse{}},
				"WatchRestore":    {ended(isCompleted, "", "")},
				"ListRestoreJobs": {&snapshotdv1.ListRestoreJobsResponse{}},
				"UpdateRestore":   {&snapshotdv1.UpdateRestoreResponse{}},
				"CancelRestore":   {&snapshotdv1.CancelRestoreResponse{}},
			}}
			if got := run(t, s, "", strings.Fields(tc.args)...); got.code != 0 || got.errOut != "" {
				t.Fatal(got)
			}
			if len(s.requests) != 1 {
				t.Fatalf("got %d requests", len(s.requests))
			}
			if diff := cmp.Diff(tc.want, s.requests[0], protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
	// A start without a token generates one, so that a repeat is harmless.
	s := &server{answers: map[string][]any{"RestoreSnapshot": {&snapshotdv1.RestoreSnapshotResponse{}}}}
	run(t, s, "", "restore", "start", "nightly", "--to", "docs")
	if len(s.requests) != 1 || s.requests[0].(*snapshotdv1.RestoreSnapshotRequest).GetRequestToken() == "" {
		t.Errorf("got %v, want one request with a token", s.requests)
	}
}

// Usage errors are reported without a call to the server.
func TestRestoreUsage(t *testing.T) {
	const rate = "use bytes per second such as 500KiB, 50MiB or 1GiB"
	for _, tc := range []struct{ args, command, want string }{
		{"restore start nightly", "restore start", "--to is missing"},
		{"restore plan nightly", "restore plan", "--to is missing"},
		{"restore start nightly --to #5", "restore start", `--to "#5": a new collection needs a name; its id is allocated`},
		{"restore start nightly --to x --max-rate fast", "restore start", `--max-rate "fast": ` + rate},
		{"restore start nightly --to x --max-rate 0", "restore start", `--max-rate "0": ` + rate},
		{"restore start nightly --to x --max-rate -1MiB", "restore start", `--max-rate "-1MiB": ` + rate},
		{"restore start nightly --to x --max-rate 1.5MiB", "restore start", `--max-rate "1.5MiB": ` + rate},
		{
			"restore start nightly --to x --max-rate 9223372036854775807KiB", "restore start",
			`--max-rate "9223372036854775807KiB": ` + rate,
		},
		{"restore limit 65 --max-rate MiB", "restore limit", `--max-rate "MiB": ` + rate},
		{"restore limit 65 --max-requests -1", "restore limit", "--max-requests -1: use a number above 0, or omit it"},
		{
			"restore start nightly --to x --give-up-after 31d", "restore start",
			`--give-up-after "31d": use a time span such as 2h or 1d, 1s to 30d`,
		},
		{
			"restore start nightly --to x --give-up-after 10ms", "restore start",
			`--give-up-after "10ms": use a time span such as 2h or 1d, 1s to 30d`,
		},
		{
			"restore start nightly --to x --give-up-after soon", "restore start",
			`--give-up-after "soon": use a time span such as 2h or 1d, 1s to 30d`,
		},
		{
			"restore start nightly --to x --property ttl", "restore start",
			`--property "ttl": use key=value, or key= to omit it`,
		},
		{"restore start nightly --to x --property =1", "restore start", `--property "=1": use key=value, or key= to omit it`},
		{
			"restore list --state done", "restore list", `--state "done": use pending, executing, completed, failed or canceled`,
		},
		{
			"restore list --state unspecified", "restore list",
			`--state "unspecified": use pending, executing, completed, failed or canceled`,
		},
	} {
		t.Run(tc.args, func(t *testing.T) {
			s := &server{}
			want := result{code: 2, errOut: fmt.Sprintf("error: %s\nhint: see `snapshotctl %s --help`\n", tc.want, tc.command)}
			if diff := cmp.Diff(want, run(t, s, "", strings.Fields(tc.args)...), cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
			if len(s.requests) != 0 {
				t.Errorf("called the server: %v", s.requests)
			}
		})
	}
	for _, args := range []string{
		"restore start", "restore start a b --to x", "restore status", "restore status x", "restore status #65",
		"restore status 0", "restore status 65 66",
		"restore watch x", "restore limit x", "restore cancel x", "restore cancel",
	} {
		s := &server{}
		got := run(t, s, "", strings.Fields(args)...)
		if got.code != 2 || got.out != "" || !strings.HasPrefix(got.errOut, "error: ") || len(s.requests) != 0 {
			t.Errorf("%s: got %+v and %d requests, want a usage error", args, got, len(s.requests))
		}
	}
}

func TestRestoreErrors(t *testing.T) {
	const object = "a file of the snapshot is missing: default/engine/7/8/101/insert/100/1 of segment 101"
	nothing := "hint: the target was rolled back and its name is free\n"
	jobs := "hint: list the jobs with `snapshotctl restore list`; an ended job is kept for a limited time\n"
	started := &snapshotdv1.RestoreSnapshotResponse{JobId: 65, CollectionId: 66}
	for _, tc := range []struct {
		name, args string
		method     string
		answer     any
		code       int
		errOut     string
	}{
		{
			"a job that fails", "restore start nightly --to docs_copy --wait", "WatchRestore",
			ended(isFailed, "SOURCE_OBJECT_MISSING", object),
			1, "error: restore job 65 is FAILED: " + object + "\n" + nothing,
		},
		{
			"a job that failed", "restore watch 65", "WatchRestore", ended(isFailed, "SOURCE_OBJECT_MISSING", object),
			1, "error: restore job 65 is FAILED: " + object + "\n" + nothing,
		},
		{
			"a job that was canceled", "restore watch 65", "WatchRestore", ended(isCanceled, "CANCELED", "it was canceled"),
			1, "error: restore job 65 is CANCELED: it was canceled\n" + nothing,
		},
		{
			"status of no job", "restore status 7", "GetRestoreState",
			answer(t, codes.NotFound, "NEVER_EXISTED", "no such id: restore job 7"),
			3, "error: no such id: restore job 7\nreason: NEVER_EXISTED\n" + jobs,
		},
		{
			"watch of an old job", "restore watch 7", "WatchRestore",
			answer(t, codes.NotFound, "EXPIRED_OR_DROPPED", "it is gone: restore job 7"),
			3, "error: it is gone: restore job 7\nreason: EXPIRED_OR_DROPPED\n" + jobs,
		},
		{
			"limit of no job", "restore limit 7", "UpdateRestore",
			answer(t, codes.NotFound, "NEVER_EXISTED", "no such id: restore job 7"),
			3, "error: no such id: restore job 7\nreason: NEVER_EXISTED\n" + jobs,
		},
		{
			"cancel of no job", "restore cancel 7", "CancelRestore",
			answer(t, codes.NotFound, "NEVER_EXISTED", "no such id: restore job 7"),
			3, "error: no such id: restore job 7\nreason: NEVER_EXISTED\n" + jobs,
		},
		{
			"cancel of a completed job", "restore cancel 65", "CancelRestore",
			answer(t, codes.FailedPrecondition, "RESTORE_ENDED", "restore has ended"),
			5, "error: restore has ended\nreason: RESTORE_ENDED\nhint: see the result with `snapshotctl restore status JOB`; " +
				"undo it with `snapshotctl catalog drop-collection COLLECTION`\n",
		},
		{
			"a name in use", "restore start nightly --to prod/docs", "RestoreSnapshot",
			answer(t, codes.AlreadyExists, "COLLECTION_EXISTS", "collection exists"),
			4, "error: collection exists\nreason: COLLECTION_EXISTS\n" +
				"hint: see it with `snapshotctl catalog get prod/docs`, or choose another name\n",
		},
		{
			"channels", "restore start nightly --to docs --channel a", "RestoreSnapshot",
			answer(t, codes.FailedPrecondition, "CHANNEL_MISMATCH", "no"),
			5, "error: no\nreason: CHANNEL_MISMATCH\nhint: use --channel once per channel of the snapshot, or not at all; " +
				"list them with `snapshotctl snapshot describe nightly`\n",
		},
		{
			"layout", "restore plan nightly --to docs", "RestoreSnapshot",
			answer(t, codes.FailedPrecondition, "LAYOUT_REFUSED", "no"),
			5, "error: no\nreason: LAYOUT_REFUSED\nhint: the file that the message names does not match the collection's " +
				"layout; " +
				"--partition or --skip-indexes may omit it\n",
		},
		{
			"the pin of a restore", "pin remove nightly 67", "UnpinSnapshot",
			answer(t, codes.FailedPrecondition, "PIN_OF_RESTORE", "no"),
			5, "error: no\nreason: PIN_OF_RESTORE\nhint: it is removed when the job ends; find the job with `snapshotctl " +
				"restore list`, " +
				"and cancel it with `snapshotctl restore cancel JOB`\n",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &server{answers: map[string][]any{"RestoreSnapshot": {started}}}
			s.answers[tc.method] = []any{tc.answer}
			got := run(t, s, "", strings.Fields(tc.args)...)
			if _, shown := tc.answer.(*snapshotdv1.RestoreJob); shown != (got.out != "") {
				t.Errorf("printed %q", got.out)
			}
			got.out = ""
			if diff := cmp.Diff(result{code: tc.code, errOut: tc.errOut}, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRestoreEvents(t *testing.T) {
	type response = snapshotdv1.WatchEventsResponse
	job := func(change snapshotdv1.ChangeType, job *snapshotdv1.RestoreJob) *snapshotdv1.WatchEventsResponse {
		return &response{ResumeToken: "b", Revision: 10, Event: &snapshotdv1.WatchEventsResponse_Restore{
			Restore: &snapshotdv1.RestoreEvent{Type: change, Job: job},
		}}
	}
	grant := func(change snapshotdv1.ChangeType, t *snapshotdv1.Tombstone) *snapshotdv1.WatchEventsResponse {
		return &response{ResumeToken: "b", Revision: 11, Event: &snapshotdv1.WatchEventsResponse_Tombstone{
			Tombstone: &snapshotdv1.TombstoneEvent{Type: change, Tombstone: t},
		}}
	}
	bookmark := &snapshotdv1.WatchEventsResponse{
		ResumeToken: "z", Revision: 12, Event: &snapshotdv1.WatchEventsResponse_Bookmark{Bookmark: &snapshotdv1.Bookmark{}},
	}
	const (
		created = snapshotdv1.ChangeType_CHANGE_TYPE_CREATED
		updated = snapshotdv1.ChangeType_CHANGE_TYPE_UPDATED
		deleted = snapshotdv1.ChangeType_CHANGE_TYPE_DELETED
	)
	s := &server{answers: map[string][]any{
		"WatchEvents ": {bookmark},
		"WatchEvents a": {
			job(created, executing()), job(updated, ended(isFailed, "TIMEOUT", "it took too long")),
			job(deleted, &snapshotdv1.RestoreJob{Id: 65}),
			grant(created, tombstone(101, byCaller)), grant(deleted, &snapshotdv1.Tombstone{Id: 101, CollectionId: 7}), bookmark,
		},
	}}
	got := run(t, s, "", "events", "--resume-token", "a")
	want := `
10          created  restore     65            EXECUTING  default/docs_copy of snapshot nightly, phase copy
10          updated  restore     65            FAILED     default/docs_copy of snapshot nightly, phase roll ` +
		`back: TIMEOUT
10          deleted  restore     65            -          -
11          created  tombstone   101           -          - of collection #7: segment
11          deleted  tombstone   101           -          - of collection #7
`
	if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), got.out); diff != "" || got.code != 0 {
		t.Errorf("exit code %d, %s", got.code, diff)
	}
}
