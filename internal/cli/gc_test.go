package cli_test

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// stream sends the answers of a method up to the first error, or all of them.
func stream[M any](s *server, name string, req proto.Message, send func(*M) error) error {
	for first := true; ; first = false {
		s.mu.Lock()
		left := len(s.answers[name])
		s.mu.Unlock()
		if !first {
			req = nil // kept once
		}
		msg, err := s.next(name, req)
		if err != nil {
			return err
		}
		if err := send(any(msg).(*M)); err != nil || left <= 1 {
			return err
		}
	}
}

func (s *server) Collect(
	req *snapshotdv1.CollectRequest, to grpc.ServerStreamingServer[snapshotdv1.CollectResponse],
) error {
	return stream(s, "Collect", req, to.Send)
}

func (s *server) ListOrphans(
	req *snapshotdv1.ListOrphansRequest, to grpc.ServerStreamingServer[snapshotdv1.ListOrphansResponse],
) error {
	return stream(s, "ListOrphans", req, to.Send)
}

func (s *server) DeleteOrphans(
	req *snapshotdv1.DeleteOrphansRequest, to grpc.ServerStreamingServer[snapshotdv1.DeleteOrphansResponse],
) error {
	return stream(s, "DeleteOrphans", req, to.Send)
}

// cycleSummary returns the summary of a cycle.
func cycleSummary() *snapshotdv1.CollectSummary {
	return &snapshotdv1.CollectSummary{
		Replica: "r1", StartTime: timestamppb.New(now), EndTime: timestamppb.New(now.Add(1500 * time.Millisecond)),
		Granted: 2, Files: 5, Bytes: 5 << 10, Waiting: 1, Held: 3, Parked: 2, Removed: 1,
	}
}

// stoppedSummary returns the summary of a cycle that stopped in a collection.
func stoppedSummary() *snapshotdv1.CollectSummary {
	return &snapshotdv1.CollectSummary{
		Replica: "r1", StartTime: timestamppb.New(now), EndTime: timestamppb.New(now),
		Stops: []*snapshotdv1.CollectStop{{CollectionId: 7, Due: 900, Total: 1000}}, StopCount: 1,
	}
}

// dryRunItems returns the plan of a dry run.
func dryRunItems() []*snapshotdv1.CollectItem {
	return []*snapshotdv1.CollectItem{
		{
			Kind: snapshotdv1.CollectItem_KIND_SEGMENT, Action: snapshotdv1.CollectItem_ACTION_DELETE, CollectionId: 7, Id: 101,
			Reason: "dropped 4h0m0s ago; nothing holds it", Files: 2, Bytes: 3 << 10,
			Objects: []*snapshotdv1.TombstoneFile{
				{Store: "default", Key: "engine/7/8/101/insert/100/1", Size: 2 << 10},
				{Store: "default", Key: "engine/7/8/101/stats\t1", Size: 1 << 10},
			},
		},
		{
			Kind: snapshotdv1.CollectItem_KIND_INDEX_BUILD, Action: snapshotdv1.CollectItem_ACTION_KEEP, CollectionId: 7,
			Id:     201,
			Reason: "held by snapshot nightly (42)",
		},
		{
			Kind: snapshotdv1.CollectItem_KIND_SNAPSHOT, Action: snapshotdv1.CollectItem_ACTION_DELETE, CollectionId: 7, Id: 42,
			Name:   "old",
			Reason: "expired at 2026-02-28T12:00:00Z",
		},
	}
}

func orphanList() []*snapshotdv1.Orphan {
	return []*snapshotdv1.Orphan{
		{
			Store: "default", Key: "engine/7/8/9/x", Size: 2 << 10, ModTime: timestamppb.New(now),
			Age:    durationpb.New(26*time.Hour + time.Millisecond),
			Reason: "its segment 9 is not known", Deletable: true, CollectionId: 7,
		},
		{
			Store: "default", Key: "engine/7/8/9/y", Size: 1, Age: durationpb.New(time.Hour),
			Reason:    "its segment 9 is not known; younger than orphan_grace, which is 24h0m0s",
			Deletable: true, Young: true, CollectionId: 7,
		},
		{
			Store: "default", Key: "engine/readme", Size: 10, Age: durationpb.New(time.Minute), Reason: "unparseable name",
			CollectionId: 7,
		},
	}
}

func TestGCOutput(t *testing.T) {
	running := &snapshotdv1.GetCollectorStatusResponse{
		LastRound: cycleSummary(), Deleting: 4, Unconfirmed: 1, Tolerance: durationpb.New(3 * time.Hour), MaxShare: 0.5,
		StopUnits: 100, Enabled: true,
	}
	ended := []any{&snapshotdv1.CollectResponse{Summary: cycleSummary()}}
	dry := []any{
		&snapshotdv1.CollectResponse{Items: dryRunItems()[:1]}, &snapshotdv1.CollectResponse{Items: dryRunItems()[1:]},
		&snapshotdv1.CollectResponse{Summary: cycleSummary()},
	}
	stops := map[string][]any{
		"Collect":            {&snapshotdv1.CollectResponse{Summary: stoppedSummary()}},
		"GetCollectorStatus": {running}, "GetCollection": {&snapshotdv1.GetCollectionResponse{Collection: collection()}},
	}
	for _, tc := range []struct {
		name, args string
		answers    map[string][]any
		want       result
	}{
		{
			"a cycle", "gc run",
			map[string][]any{"Collect": ended},
			result{out: `
snapshotd deletes 2 units: 5 files, 5.0 KiB
waiting: 1 unit, dropped too recently
held: 3 units, the records of 2 in the object store
removed: 1 collection, partition or index
`},
		},
		{
			"a cycle with --wait", "gc run --wait",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{
				Granted: 1, Files: 1, Bytes: 7,
			}}}},
			result{out: "\ndeleted 1 unit: 1 file, 7 B\n"},
		},
		{
			"nothing", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{}}}},
			result{out: "\nno unit can be deleted\n"},
		},
		{
			"a dry run", "gc run --dry-run",
			map[string][]any{"Collect": dry},
			result{out: `
ACTION  KIND         ID   COLLECTION  FILES  BYTES    REASON
delete  segment      101  #7          2      3.0 KiB  dropped 4h0m0s ago; nothing holds it
keep    index_build  201       #7          -      -        held by snapshot nightly (42)
delete  snapshot     42 (old)  #7          0      0 B      expired at 2026-02-28T12:00:00Z
would delete 2 units: 5 files, 5.0 KiB
waiting: 1 unit, dropped too recently
held: 3 units, the records of 2 in the object store
would remove: 1 collection, partition or index
`},
		},
		{
			"a dry run with objects", "gc run --dry-run --objects",
			map[string][]any{"Collect": {
				&snapshotdv1.CollectResponse{Items: dryRunItems()},
				&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Granted: 1, Files: 2, Bytes: 3 << 10}},
			}},
			result{out: `
ACTION  KIND         ID   COLLECTION  FILES  BYTES    REASON
delete  segment      101  #7          2      3.0 KiB  dropped 4h0m0s ago; nothing holds it
    default  engine/7/8/101/insert/100/1  2.0 KiB
    default  "engine/7/8/101/stats\t1"  1.0 KiB
keep    index_build  201       #7          -      -        held by snapshot nightly (42)
delete  snapshot     42 (old)  #7          0      0 B      expired at 2026-02-28T12:00:00Z
would delete 1 unit: 2 files, 3.0 KiB
`},
		},
		{
			"a cycle as JSON", "gc run -o json",
			map[string][]any{"Collect": {
				&snapshotdv1.CollectResponse{Items: dryRunItems()[2:]},
				&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Granted: 1}},
			}},
			result{out: `
{"items":[{"kind":"KIND_SNAPSHOT","action":"ACTION_DELETE","collectionId":"7","id":"42","name":"old",` +
				`"reason":"expired at 2026-02-28T12:00:00Z"}]}
{"summary":{"granted":"1"}}
`},
		},
		{
			"a stop", "gc run", stops,
			result{
				code: 5, out: "\nstopped in collection docs (7): would delete 900 of 1000 units and segments, more than 50%; " +
					"see the plan with `snapshotctl gc run --collection docs --dry-run`; if it is intended, run with --force\n",
				errOut: "error: the cycle stopped in 1 collection\n",
			},
		},
		{
			"a stop in a dry run", "gc run --dry-run --tolerance 1h", stops,
			result{
				code: 5, out: "\nwould stop in collection docs (7): would delete 900 of 1000 units and segments, more than " +
					"50%; if this is intended: `snapshotctl gc run --collection docs --tolerance 1h0m0s --force`\n",
				errOut: "error: the cycle would stop in 1 collection\n",
			},
		},
		{
			"stops without details", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{
				Stops: stoppedSummary().GetStops(), StopCount: 3,
			}}}},
			result{
				code: 5, out: "\nstopped in collection #7: would delete 900 of 1000 units and segments, more than the " +
					"configured share; see the plan with `snapshotctl gc run --collection '#7' --dry-run`; if it is intended, run " +
					"with --force\nstopped in 2 collections more\n",
				errOut: "error: the cycle stopped in 3 collections\n",
			},
		},
		{
			"a removed partition and a sweep", "gc run --sweep",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{
				Removed: 1, Swept: 2, SweptBytes: 7,
			}}}},
			result{
				out: "\nremoved: 1 collection, partition or index\nswept: 2 objects, 7 B, orphans under snapshotd's own prefixes\n",
			},
		},
		{
			"an error", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{
				Granted: 1, Error: "collection a (7): no",
			}}}},
			result{
				code: 1, out: "\nsnapshotd deletes 1 unit: 0 files, 0 B\n",
				errOut: "error: the cycle failed in part: collection a (7): no\n",
			},
		},
		{
			"no summary", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Items: dryRunItems()}}},
			result{
				code: 1, out: "\n", errOut: "error: the server ended the cycle without a summary; see `snapshotctl gc status`\n",
			},
		},
		{
			"behind", "gc run",
			map[string][]any{"Collect": {answer(
				t, codes.FailedPrecondition, "METADATA_BEHIND", "the metadata store is behind",
			)}},
			result{
				code: 5, out: "\n",
				errOut: "error: the metadata store is behind\nreason: METADATA_BEHIND\n" +
					"hint: the metadata store is older than its heartbeats in the object store, as after a restore from a backup; " +
					"if it was restored, `snapshotctl recover` unblocks it\n",
			},
		},
		{
			"the server, behind", "info",
			map[string][]any{
				"GetServerInfo":      {&snapshotdv1.GetServerInfoResponse{Version: "1", Leader: "r1", Stores: []string{"default"}}},
				"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{Blocked: "the metadata store is behind"}},
			},
			result{out: `
version:        1
cluster:        -
replica:        -
leader:         r1
snapshot names: unique per unspecified
stores:         default
snapshot store: -
blocked:        METADATA_BEHIND: the metadata store is behind
`},
		},
		{
			"status", "gc status",
			map[string][]any{"GetCollectorStatus": {running}},
			result{out: `
collector:                on
blocked:                  no
tolerance:                3h0m0s
stops at:                 50% of a collection, at least 100 units
deleting:                 4 units
not confirmed by callers: 1 unit
Last cycle
  replica:    r1
  started:    2026-03-01T12:00:00Z
  took:       1.5s
  granted:    2 units: 5 files, 5.0 KiB
  waiting:    1 unit
  held:       3 units, the records of 2 in the object store
  removed:    1 collection, partition or index
  stopped in: nowhere
  error:      none
`},
		},
		{
			"status with an error", "gc status",
			map[string][]any{
				"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{
					MaxShare: 0.125, Blocked: "the metadata store is behind", Tolerance: durationpb.New(time.Minute),
					LastRound: &snapshotdv1.CollectSummary{
						StartTime: timestamppb.New(now), EndTime: timestamppb.New(now), Stops: stoppedSummary().GetStops(), StopCount: 2,
						Error: "no\tstore",
					},
				}},
				"GetCollection": {&snapshotdv1.GetCollectionResponse{Collection: collection()}},
			},
			result{out: `
collector:                off: runs no cycles and no sweeps; dropped and expired snapshots are still removed
blocked:                  the metadata store is behind
tolerance:                1m0s
stops at:                 12.5% of a collection
deleting:                 0 units
not confirmed by callers: 0 units
Last cycle
  replica:    -
  started:    2026-03-01T12:00:00Z
  took:       0s
  granted:    0 units: 0 files, 0 B
  waiting:    0 units
  held:       0 units
  removed:    0 collections, partitions and indexes
  stopped in: docs (7): 900 of 1000 units and segments; 1 more
  error:      "no\tstore"
See the plan with ` + "`snapshotctl gc run --collection docs --dry-run`; if it is intended, run with --force.\n"},
		},
		{
			"status with halts", "gc status",
			map[string][]any{"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{
				MaxShare: 1, Enabled: true,
				LastRound: &snapshotdv1.CollectSummary{StartTime: timestamppb.New(now), EndTime: timestamppb.New(now)},
				Halts: []*snapshotdv1.CollectorHalt{
					{Name: "leader", What: "expiry, removal and collection", Error: "no replica leads"},
					{
						Name: "remove", What: "removal of dropped snapshots", Error: "denied", SinceTime: timestamppb.New(now),
						Replica: "a", Failures: 7,
					},
				},
			}}},
			result{out: `
collector:                on
blocked:                  no
tolerance:                0s
stops at:                 100% of a collection
deleting:                 0 units
not confirmed by callers: 0 units
Halted
  expiry, removal and collection: no replica leads
  removal of dropped snapshots: denied; since 2026-03-01T12:00:00Z, 7 failures, in replica a
Last cycle
  replica:    -
  started:    2026-03-01T12:00:00Z
  took:       0s
  granted:    0 units: 0 files, 0 B
  waiting:    0 units
  held:       0 units
  removed:    0 collections, partitions and indexes
  stopped in: nowhere
  error:      see Halted, above
`},
		},
		{
			"status before the first cycle", "gc status",
			map[string][]any{"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{MaxShare: 1, Enabled: true}}},
			result{out: `
collector:                on
blocked:                  no
tolerance:                0s
stops at:                 100% of a collection
deleting:                 0 units
not confirmed by callers: 0 units
No cycle has run yet.
`},
		},
		{
			"status as JSON", "gc status -o json",
			map[string][]any{"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{MaxShare: 0.5, Enabled: true}}},
			result{out: "\n{\n  \"maxShare\": 0.5,\n  \"enabled\": true\n}\n"},
		},
		{
			"an object that stays", "gc explain engine/7/8/101/x",
			map[string][]any{"ExplainObject": {&snapshotdv1.ExplainObjectResponse{
				Exists: true, What: "a file of segment 101", Kept: true, Reason: "dropped, and held", CollectionId: 7,
				SegmentId: 101,
				Holders:   []*snapshotdv1.Holder{heldBySnapshot(42, "nightly"), heldByCreate(44)},
			}}},
			result{out: `
engine/7/8/101/x: a file of segment 101
It is
  - held by snapshot nightly (42)
  - possibly held by a snapshot that is being created (44)
It stays: dropped, and held
More: snapshotctl explain --collection '#7' 101
`},
		},
		{
			"an object that does not exist", "gc explain snapshots/7/42/x --store default",
			map[string][]any{"ExplainObject": {&snapshotdv1.ExplainObjectResponse{
				Reason: "No such object. If it existed: the next sweep deletes it",
			}}},
			result{out: "\nsnapshots/7/42/x: unknown\nNo such object. If it existed: the next sweep deletes it\n"},
		},
		{
			"a file of an index build, whose holder the reason names", "gc explain engine/7/8/101/x",
			map[string][]any{"ExplainObject": {&snapshotdv1.ExplainObjectResponse{
				Exists: true, What: "a file of index build 201", Kept: true, Reason: `held by snapshot "nightly"`, CollectionId: 7,
				SegmentId: 101, IndexBuildId: 201,
				Holders: []*snapshotdv1.Holder{heldBySnapshot(42, "nightly")},
			}}},
			result{out: `
engine/7/8/101/x: a file of index build 201
It stays: held by snapshot "nightly"
More: snapshotctl explain --collection '#7' --build 201
`},
		},
		{
			"an object in an unknown store", "gc explain x --store none",
			map[string][]any{"ExplainObject": {answer(t, codes.NotFound, "STORE_NOT_FOUND", "no store \"none\"")}},
			result{
				code: 3, out: "\n",
				errOut: "error: no store \"none\"\nreason: STORE_NOT_FOUND\nhint: list the stores with `snapshotctl info`\n",
			},
		},
		{
			"orphans", "gc orphans --collection docs",
			map[string][]any{"ListOrphans": {&snapshotdv1.ListOrphansResponse{Orphans: orphanList()}}},
			result{out: `
STORE    KEY             SIZE     AGE      DELETABLE  REASON
default  engine/7/8/9/x  2.0 KiB  26h0m0s  yes        its segment 9 is not known
default  engine/7/8/9/y  1 B      1h0m0s   not yet    its segment 9 is not known; younger than orphan_grace, ` +
				`which is 24h0m0s
default  engine/readme   10 B     1m0s     no         unparseable name
3 orphans, 2.0 KiB; deletable: 1, 2.0 KiB
`},
		},
		{
			"no orphans", "gc orphans",
			map[string][]any{"ListOrphans": {&snapshotdv1.ListOrphansResponse{}}},
			result{out: "\nSTORE  KEY  SIZE  AGE  DELETABLE  REASON\n0 orphans, 0 B; deletable: 0, 0 B\n"},
		},
		{
			"orphans deleted up to an error", "gc orphans --collection docs --delete --grace 24h",
			map[string][]any{"DeleteOrphans": {
				&snapshotdv1.DeleteOrphansResponse{Deleted: orphanList()[:1]},
				answer(t, codes.Unavailable, "STORE_UNAVAILABLE", "the object store did not answer"),
			}},
			result{code: 6, out: `
STORE    KEY             SIZE     AGE      DELETABLE  REASON
default  engine/7/8/9/x  2.0 KiB  26h0m0s  yes        its segment 9 is not known
deleted: 1 object, 2.0 KiB
`, errOut: "error: the object store did not answer\nreason: STORE_UNAVAILABLE\n" +
				"hint: the server runs, but its metadata or object store did not respond; run the command again when it does\n"},
		},
		{
			"orphans as JSON", "gc orphans -o json",
			map[string][]any{"ListOrphans": {
				&snapshotdv1.ListOrphansResponse{Orphans: orphanList()[2:]}, &snapshotdv1.ListOrphansResponse{},
			}},
			result{out: `
{"orphans":[{"store":"default","key":"engine/readme","size":"10","age":"60s","reason":"unparseable ` +
				`name","collectionId":"7"}]}
{}
`},
		},
		{
			"recovered", "recover",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{WasBehind: true, NextId: 4096, SkippedFrom: 100}}},
			result{
				out: "\nthe metadata store was behind and is unblocked; skipped 3996 ids, from 100 to 4095; the next is 4096\n",
			},
		},
		{
			"clock stopped", "info",
			map[string][]any{
				"GetServerInfo":      {&snapshotdv1.GetServerInfoResponse{Version: "1", Leader: "r1", Stores: []string{"default"}}},
				"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{ClockStopped: "the clock stepped"}},
			},
			result{out: `
version:        1
cluster:        -
replica:        -
leader:         r1
snapshot names: unique per unspecified
stores:         default
snapshot store: -
clock:          CLOCK_UNTRUSTED: the clock stepped
`},
		},
		{
			"clock recovered", "recover --clock",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{
				ClockWasStopped: true, ClockTime: timestamppb.New(time.Unix(0, 0)),
			}}},
			result{out: "\nthe clock is trusted again: 1970-01-01T00:00:00Z\n"},
		},
		{
			"a clock that is already trusted", "recover --clock",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{ClockTime: timestamppb.New(time.Unix(0, 0))}}},
			result{out: "\nnothing to do: the clock is trusted: 1970-01-01T00:00:00Z\n"},
		},
		{
			"recovered without ids", "recover",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{WasBehind: true, NextId: 100, SkippedFrom: 100}}},
			result{out: "\nthe metadata store was behind and is unblocked; no ids skipped; the next is 100\n"},
		},
		{
			"nothing to recover", "recover",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{NextId: 100, SkippedFrom: 100}}},
			result{out: "\nnothing to do: the metadata store is not behind the object store\n"},
		},
		{
			"recovered, as JSON", "recover -o json",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{WasBehind: true, NextId: 2, SkippedFrom: 1}}},
			result{out: "\n{\n  \"wasBehind\": true,\n  \"nextId\": \"2\",\n  \"skippedFrom\": \"1\"\n}\n"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answers := map[string][]any{}
			maps.Copy(answers, tc.answers)
			got := run(t, &server{answers: answers}, "", strings.Fields(tc.args)...)
			tc.want.out = tc.want.out[1:]
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestGCRequests checks the requests built from flags.
func TestGCRequests(t *testing.T) {
	docs := &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Name{Name: &snapshotdv1.CollectionName{
		Name: "docs",
	}}}
	for args, want := range map[string]proto.Message{
		"gc run": &snapshotdv1.CollectRequest{},
		"gc run --collection docs --tolerance 0s --force --wait": &snapshotdv1.CollectRequest{
			Collection: docs, Tolerance: durationpb.New(0), Force: true, Wait: true,
		},
		"gc run --sweep --tolerance 7d": &snapshotdv1.CollectRequest{
			Sweep: true, Tolerance: durationpb.New(7 * 24 * time.Hour),
		},
		"gc run --dry-run --tolerance 90m": &snapshotdv1.CollectRequest{
			DryRun: true, Tolerance: durationpb.New(90 * time.Minute),
		},
		"gc status":                    &snapshotdv1.GetCollectorStatusRequest{},
		"gc explain a/b --store cold":  &snapshotdv1.ExplainObjectRequest{Key: "a/b", Store: "cold"},
		"gc orphans":                   &snapshotdv1.ListOrphansRequest{},
		"gc orphans --collection docs": &snapshotdv1.ListOrphansRequest{Collection: docs},
		"gc orphans --collection docs --delete --grace 2d": &snapshotdv1.DeleteOrphansRequest{
			Collection: docs, Grace: durationpb.New(48 * time.Hour),
		},
		"gc orphans --collection docs --delete --grace 1h": &snapshotdv1.DeleteOrphansRequest{
			Collection: docs, Grace: durationpb.New(time.Hour),
		},
		"gc orphans --collection docs --delete --grace 1h30m ": &snapshotdv1.DeleteOrphansRequest{
			Collection: docs, Grace: durationpb.New(90 * time.Minute),
		},
		"recover":         &snapshotdv1.RecoverRequest{},
		"recover --clock": &snapshotdv1.RecoverRequest{Clock: true},
	} {
		s := &server{answers: map[string][]any{
			"Collect":            {&snapshotdv1.CollectResponse{Summary: cycleSummary()}},
			"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{}},
			"ExplainObject":      {&snapshotdv1.ExplainObjectResponse{}}, "ListOrphans": {&snapshotdv1.ListOrphansResponse{}},
			"DeleteOrphans": {&snapshotdv1.DeleteOrphansResponse{}}, "Recover": {&snapshotdv1.RecoverResponse{}},
		}}
		if got := run(t, s, "", strings.Fields(args)...); got.code != 0 {
			t.Errorf("%s: %s", args, got.errOut)
		}
		if diff := cmp.Diff([]proto.Message{want}, s.requests, protocmp.Transform()); diff != "" {
			t.Errorf("%s: %s", args, diff)
		}
	}
}

// TestGCUsage checks that usage errors are reported without a call to the server.
func TestGCUsage(t *testing.T) {
	for args, want := range map[string]string{
		"gc run --force": "--force requires --collection",
		"gc run --objects": "--objects requires --dry-run; `snapshotctl reclaim list " +
			"--files` lists the objects that a cycle has granted",
		"gc run --dry-run --wait":  "--wait and --dry-run exclude each other",
		"gc run --tolerance -1s":   "--tolerance -1s: it must not be negative",
		"gc run --collection #x":   "\"x\" is not an id: ids are positive numbers",
		"gc run --tolerance 3651d": "--tolerance 3651d: at most ten years, 3650d",
		"gc run --tolerance soon": "invalid argument \"soon\" for \"--tolerance\" flag: use a " +
			"time span such as 36h or 30d",
		"gc run --sweep --collection d": "--sweep and --collection exclude each other: a sweep covers " +
			"snapshotd's own prefixes in all stores",
		"gc orphans --collection d --delete --grace 59m": "--grace 59m: at least 1h: files are written before they are " +
			"registered",
		"gc run --collection=":              "--collection is empty",
		"gc orphans --collection=":          "--collection is empty",
		"events --collection=":              "--collection is empty",
		"reclaim list --collection=":        "--collection is empty",
		"snapshot list --collection=":       "--collection is empty",
		"snapshot describe s --collection=": "--collection is empty",
		"gc run docs":                       "unexpected argument \"docs\"",
		"gc explain":                        "KEY is missing",
		"gc orphans --delete": "--delete requires --collection; under snapshotd's own " +
			"prefixes the collector deletes orphans by itself",
		"gc orphans --delete --grace 2h": "--delete requires --collection; under snapshotd's own " +
			"prefixes the collector deletes orphans by itself",
		"gc orphans --collection d --delete": "--delete requires --grace, such as 24h, longer than any file " +
			"stays unregistered",
		"gc orphans --grace 2h": "--grace requires --delete; without it orphans of any age are " +
			"listed",
		"recover now": "unexpected argument \"now\"",
	} {
		s := &server{answers: map[string][]any{}}
		got := run(t, s, "", strings.Fields(args)...)
		if got.code != 2 || got.out != "" || !strings.HasPrefix(got.errOut, "error: "+want+"\n") {
			t.Errorf("%s: got %+v", args, got)
		}
		if len(s.requests) > 0 {
			t.Errorf("%s: called the server", args)
		}
	}
}
