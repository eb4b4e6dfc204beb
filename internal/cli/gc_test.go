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

// stream answers a stream with all that there is for a method, up to the first
// error, or to the end.
func stream[M any](s *server, name string, req proto.Message, send func(*M) error) error {
	for first := true; ; first = false {
		s.mu.Lock()
		left := len(s.answers[name])
		s.mu.Unlock()
		if !first {
			req = nil // it is kept once
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

func (s *server) Collect(req *snapshotdv1.CollectRequest, to grpc.ServerStreamingServer[snapshotdv1.CollectResponse]) error {
	return stream(s, "Collect", req, to.Send)
}

func (s *server) ListOrphans(req *snapshotdv1.ListOrphansRequest, to grpc.ServerStreamingServer[snapshotdv1.ListOrphansResponse]) error {
	return stream(s, "ListOrphans", req, to.Send)
}

func (s *server) DeleteOrphans(req *snapshotdv1.DeleteOrphansRequest, to grpc.ServerStreamingServer[snapshotdv1.DeleteOrphansResponse]) error {
	return stream(s, "DeleteOrphans", req, to.Send)
}

// round is what a round came to.
func cycleSummary() *snapshotdv1.CollectSummary {
	return &snapshotdv1.CollectSummary{
		Replica: "r1", StartTime: timestamppb.New(now), EndTime: timestamppb.New(now.Add(1500 * time.Millisecond)),
		Granted: 2, Files: 5, Bytes: 5 << 10, Waiting: 1, Held: 3, Parked: 2, Removed: 1,
	}
}

// stopped is what a round came to that stopped in two collections and more.
func stoppedSummary() *snapshotdv1.CollectSummary {
	return &snapshotdv1.CollectSummary{
		Replica: "r1", StartTime: timestamppb.New(now), EndTime: timestamppb.New(now),
		Stops: []*snapshotdv1.CollectStop{{CollectionId: 7, Due: 900, Total: 1000}}, StopCount: 1,
	}
}

// looked are things that a dry run looked at.
func dryRunItems() []*snapshotdv1.CollectItem {
	return []*snapshotdv1.CollectItem{
		{
			Kind: snapshotdv1.CollectItem_KIND_SEGMENT, Action: snapshotdv1.CollectItem_ACTION_DELETE, CollectionId: 7, Id: 101,
			Reason: "dropped 4h0m0s ago; nothing holds it", Files: 2, Bytes: 3 << 10,
			Objects: []*snapshotdv1.TombstoneFile{
				{Store: "default", Key: "engine/7/8/101/insert/100/1", Size: 2 << 10}, {Store: "default", Key: "engine/7/8/101/stats\t1", Size: 1 << 10},
			},
		},
		{
			Kind: snapshotdv1.CollectItem_KIND_INDEX_BUILD, Action: snapshotdv1.CollectItem_ACTION_KEEP, CollectionId: 7, Id: 201,
			Reason: "held by snapshot nightly (42)",
		},
		{
			Kind: snapshotdv1.CollectItem_KIND_SNAPSHOT, Action: snapshotdv1.CollectItem_ACTION_DELETE, CollectionId: 7, Id: 42, Name: "old",
			Reason: "expired at 2026-02-28T12:00:00Z",
		},
	}
}

func orphanList() []*snapshotdv1.Orphan {
	return []*snapshotdv1.Orphan{
		{
			Store: "default", Key: "engine/7/8/9/x", Size: 2 << 10, ModTime: timestamppb.New(now), Age: durationpb.New(26*time.Hour + time.Millisecond),
			Reason: "its segment 9 is not known", Deletable: true, CollectionId: 7,
		},
		{
			Store: "default", Key: "engine/7/8/9/y", Size: 1, Age: durationpb.New(time.Hour), Reason: "its segment 9 is not known; younger than orphan_grace, which is 24h0m0s",
			Deletable: true, Young: true, CollectionId: 7,
		},
		{Store: "default", Key: "engine/readme", Size: 10, Age: durationpb.New(time.Minute), Reason: "its name says nothing", CollectionId: 7},
	}
}

func TestGCOutput(t *testing.T) {
	running := &snapshotdv1.GetCollectorStatusResponse{
		LastRound: cycleSummary(), Deleting: 4, Unconfirmed: 1, Tolerance: durationpb.New(3 * time.Hour), MaxShare: 0.5, StopUnits: 100, Enabled: true,
	}
	ended := []any{&snapshotdv1.CollectResponse{Summary: cycleSummary()}}
	dry := []any{&snapshotdv1.CollectResponse{Items: dryRunItems()[:1]}, &snapshotdv1.CollectResponse{Items: dryRunItems()[1:]}, &snapshotdv1.CollectResponse{Summary: cycleSummary()}}
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
			"a round", "gc run",
			map[string][]any{"Collect": ended},
			result{out: `
snapshotd deletes 2 units: 5 files, 5.0 KiB
waiting: 1 unit, dropped too recently
held: 3 units, the records of 2 in the object store
gone for good: 1 collection, partition or index
`},
		},
		{
			"a round, awaited", "gc run --wait",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Granted: 1, Files: 1, Bytes: 7}}}},
			result{out: "\ndeleted 1 unit: 1 file, 7 B\n"},
		},
		{
			"nothing", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{}}}},
			result{out: "\nno unit can go\n"},
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
would be gone for good: 1 collection, partition or index
`},
		},
		{
			"a dry run with objects", "gc run --dry-run --objects",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Items: dryRunItems()}, &snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Granted: 1, Files: 2, Bytes: 3 << 10}}}},
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
			"a round as JSON", "gc run -o json",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Items: dryRunItems()[2:]}, &snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Granted: 1}}}},
			result{out: `
{"items":[{"kind":"KIND_SNAPSHOT","action":"ACTION_DELETE","collectionId":"7","id":"42","name":"old","reason":"expired at 2026-02-28T12:00:00Z"}]}
{"summary":{"granted":"1"}}
`},
		},
		{
			"a stop", "gc run", stops,
			result{
				code: 5, out: "\nstopped in collection docs (7): 900 of 1000 units and segments would go, more than 50%; look with `snapshotctl gc run --collection docs --dry-run`, and if so much shall go, run it with --force instead\n",
				errOut: "error: the round stopped in 1 collection\n",
			},
		},
		{
			"a stop in a dry run", "gc run --dry-run --tolerance 1h", stops,
			result{
				code: 5, out: "\nwould stop in collection docs (7): 900 of 1000 units and segments would go, more than 50%; if so much shall go: `snapshotctl gc run --collection docs --tolerance 1h0m0s --force`\n",
				errOut: "error: the round would stop in 1 collection\n",
			},
		},
		{
			"stops of which little is known", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Stops: stoppedSummary().GetStops(), StopCount: 3}}}},
			result{
				code: 5, out: "\nstopped in collection #7: 900 of 1000 units and segments would go, more than the configured share; look with `snapshotctl gc run --collection '#7' --dry-run`, and if so much shall go, run it with --force instead\nstopped in 2 collections more\n",
				errOut: "error: the round stopped in 3 collections\n",
			},
		},
		{
			"a round that ends a partition, and a sweep", "gc run --sweep",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Removed: 1, Swept: 2, SweptBytes: 7}}}},
			result{out: "\ngone for good: 1 collection, partition or index\nswept: 2 objects, 7 B, of snapshotd's own that nothing knows\n"},
		},
		{
			"trouble", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Summary: &snapshotdv1.CollectSummary{Granted: 1, Error: "collection a (7): no"}}}},
			result{code: 1, out: "\nsnapshotd deletes 1 unit: 0 files, 0 B\n", errOut: "error: the round met trouble: collection a (7): no\n"},
		},
		{
			"no summary", "gc run",
			map[string][]any{"Collect": {&snapshotdv1.CollectResponse{Items: dryRunItems()}}},
			result{code: 1, out: "\n", errOut: "error: the server ended the round without saying what it came to; see `snapshotctl gc status`\n"},
		},
		{
			"behind", "gc run",
			map[string][]any{"Collect": {answer(t, codes.FailedPrecondition, "METADATA_BEHIND", "the metadata store is behind")}},
			result{
				code: 5, out: "\n",
				errOut: "error: the metadata store is behind\nreason: METADATA_BEHIND\nhint: the metadata store is older than what it wrote into the object store, as after it was restored from a backup; when that is so, `snapshotctl recover` lets it go on\n",
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
stops at:                 50% of a collection, from 100 units on
deleting:                 4 units
not confirmed by callers: 1 unit
Last round
  by:            r1
  began:         2026-03-01T12:00:00Z
  took:          1.5s
  granted:       2 units: 5 files, 5.0 KiB
  waiting:       1 unit
  held:          3 units, the records of 2 in the object store
  gone for good: 1 collection, partition or index
  stopped in:    nowhere
  trouble:       none
`},
		},
		{
			"status with trouble", "gc status",
			map[string][]any{
				"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{
					MaxShare: 0.125, Blocked: "the metadata store is behind", Tolerance: durationpb.New(time.Minute),
					LastRound: &snapshotdv1.CollectSummary{StartTime: timestamppb.New(now), EndTime: timestamppb.New(now), Stops: stoppedSummary().GetStops(), StopCount: 2, Error: "no\tstore"},
				}},
				"GetCollection": {&snapshotdv1.GetCollectionResponse{Collection: collection()}},
			},
			result{out: `
collector:                off: makes no rounds and no sweeps; dropped and expired snapshots are still removed
blocked:                  the metadata store is behind
tolerance:                1m0s
stops at:                 12.5% of a collection
deleting:                 0 units
not confirmed by callers: 0 units
Last round
  by:            -
  began:         2026-03-01T12:00:00Z
  took:          0s
  granted:       0 units: 0 files, 0 B
  waiting:       0 units
  held:          0 units
  gone for good: 0 collections, partitions and indexes
  stopped in:    docs (7): 900 of 1000 units and segments; 1 more
  trouble:       "no\tstore"
Look with ` + "`snapshotctl gc run --collection docs --dry-run`; if so much shall go, run it with --force instead.\n"},
		},
		{
			"status while things stand still", "gc status",
			map[string][]any{"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{
				MaxShare: 1, Enabled: true, LastRound: &snapshotdv1.CollectSummary{StartTime: timestamppb.New(now), EndTime: timestamppb.New(now)},
				Halts: []*snapshotdv1.CollectorHalt{
					{Name: "leader", What: "expiry, removal and collection", Error: "no replica leads"},
					{Name: "remove", What: "removal of dropped snapshots", Error: "denied", SinceTime: timestamppb.New(now), Replica: "a", Failures: 7},
				},
			}}},
			result{out: `
collector:                on
blocked:                  no
tolerance:                0s
stops at:                 100% of a collection
deleting:                 0 units
not confirmed by callers: 0 units
Stands still
  expiry, removal and collection: no replica leads
  removal of dropped snapshots: denied; since 2026-03-01T12:00:00Z, 7 failures, in replica a
Last round
  by:            -
  began:         2026-03-01T12:00:00Z
  took:          0s
  granted:       0 units: 0 files, 0 B
  waiting:       0 units
  held:          0 units
  gone for good: 0 collections, partitions and indexes
  stopped in:    nowhere
  trouble:       see what stands still, above
`},
		},
		{
			"status before the first round", "gc status",
			map[string][]any{"GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{MaxShare: 1, Enabled: true}}},
			result{out: `
collector:                on
blocked:                  no
tolerance:                0s
stops at:                 100% of a collection
deleting:                 0 units
not confirmed by callers: 0 units
There was no round yet.
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
				Exists: true, What: "a file of segment 101", Kept: true, Reason: "dropped, and held", CollectionId: 7, SegmentId: 101,
				Holders: []*snapshotdv1.Holder{heldBySnapshot(42, "nightly"), heldByCreate(44)},
			}}},
			result{out: `
engine/7/8/101/x: a file of segment 101
It is
  - held by snapshot nightly (42)
  - held by a snapshot that is being created (44) and may come to need it
It stays: dropped, and held
More: snapshotctl explain --collection '#7' 101
`},
		},
		{
			"an object that is not there", "gc explain snapshots/7/42/x --store default",
			map[string][]any{"ExplainObject": {&snapshotdv1.ExplainObjectResponse{Reason: "There is no such object. If there were: it would go"}}},
			result{out: "\nsnapshots/7/42/x: not known\nThere is no such object. If there were: it would go\n"},
		},
		{
			"a file of an index build, whose holder the reason names", "gc explain engine/7/8/101/x",
			map[string][]any{"ExplainObject": {&snapshotdv1.ExplainObjectResponse{
				Exists: true, What: "a file of index build 201", Kept: true, Reason: `held by snapshot "nightly"`, CollectionId: 7, SegmentId: 101, IndexBuildId: 201,
				Holders: []*snapshotdv1.Holder{heldBySnapshot(42, "nightly")},
			}}},
			result{out: `
engine/7/8/101/x: a file of index build 201
It stays: held by snapshot "nightly"
More: snapshotctl explain --collection '#7' --build 201
`},
		},
		{
			"an object in a store that is not there", "gc explain x --store none",
			map[string][]any{"ExplainObject": {answer(t, codes.NotFound, "STORE_NOT_FOUND", "no store \"none\"")}},
			result{code: 3, out: "\n", errOut: "error: no store \"none\"\nreason: STORE_NOT_FOUND\nhint: see which there are with `snapshotctl info`\n"},
		},
		{
			"orphans", "gc orphans --collection docs",
			map[string][]any{"ListOrphans": {&snapshotdv1.ListOrphansResponse{Orphans: orphanList()}}},
			result{out: `
STORE    KEY             SIZE     AGE      DELETABLE  REASON
default  engine/7/8/9/x  2.0 KiB  26h0m0s  yes        its segment 9 is not known
default  engine/7/8/9/y  1 B      1h0m0s   not yet    its segment 9 is not known; younger than orphan_grace, which is 24h0m0s
default  engine/readme   10 B     1m0s     no         its name says nothing
3 orphans, 2.0 KiB; deletable: 1, 2.0 KiB
`},
		},
		{
			"no orphans", "gc orphans",
			map[string][]any{"ListOrphans": {&snapshotdv1.ListOrphansResponse{}}},
			result{out: "\nSTORE  KEY  SIZE  AGE  DELETABLE  REASON\n0 orphans, 0 B; deletable: 0, 0 B\n"},
		},
		{
			"orphans deleted, until there was trouble", "gc orphans --collection docs --delete --grace 24h",
			map[string][]any{"DeleteOrphans": {&snapshotdv1.DeleteOrphansResponse{Deleted: orphanList()[:1]}, answer(t, codes.Unavailable, "STORE_UNAVAILABLE", "the object store did not answer")}},
			result{code: 6, out: `
STORE    KEY             SIZE     AGE      DELETABLE  REASON
default  engine/7/8/9/x  2.0 KiB  26h0m0s  yes        its segment 9 is not known
deleted: 1 object, 2.0 KiB
`, errOut: "error: the object store did not answer\nreason: STORE_UNAVAILABLE\nhint: the server runs, but its metadata or object store did not answer; run the command again when it does\n"},
		},
		{
			"orphans as JSON", "gc orphans -o json",
			map[string][]any{"ListOrphans": {&snapshotdv1.ListOrphansResponse{Orphans: orphanList()[2:]}, &snapshotdv1.ListOrphansResponse{}}},
			result{out: `
{"orphans":[{"store":"default","key":"engine/readme","size":"10","age":"60s","reason":"its name says nothing","collectionId":"7"}]}
{}
`},
		},
		{
			"recovered", "recover",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{WasBehind: true, NextId: 4096, SkippedFrom: 100}}},
			result{out: "\nthe metadata store was behind, and goes on; skipped 3996 ids, from 100 to 4095; the next is 4096\n"},
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
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{ClockWasStopped: true, ClockTime: timestamppb.New(time.Unix(0, 0))}}},
			result{out: "\nthe clock is trusted again: it is 1970-01-01T00:00:00Z\n"},
		},
		{
			"clock to recover that is trusted", "recover --clock",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{ClockTime: timestamppb.New(time.Unix(0, 0))}}},
			result{out: "\nnothing had to be done: the clock is trusted, it is 1970-01-01T00:00:00Z\n"},
		},
		{
			"recovered without ids", "recover",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{WasBehind: true, NextId: 100, SkippedFrom: 100}}},
			result{out: "\nthe metadata store was behind, and goes on; no ids had to be skipped, the next is 100\n"},
		},
		{
			"nothing to recover", "recover",
			map[string][]any{"Recover": {&snapshotdv1.RecoverResponse{NextId: 100, SkippedFrom: 100}}},
			result{out: "\nnothing had to be done: the metadata store is not known to be behind the object store\n"},
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

// Flags become what the API calls them.
func TestGCRequests(t *testing.T) {
	docs := &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Name{Name: &snapshotdv1.CollectionName{Name: "docs"}}}
	for args, want := range map[string]proto.Message{
		"gc run": &snapshotdv1.CollectRequest{},
		"gc run --collection docs --tolerance 0s --force --wait": &snapshotdv1.CollectRequest{
			Collection: docs, Tolerance: durationpb.New(0), Force: true, Wait: true,
		},
		"gc run --sweep --tolerance 7d":                        &snapshotdv1.CollectRequest{Sweep: true, Tolerance: durationpb.New(7 * 24 * time.Hour)},
		"gc run --dry-run --tolerance 90m":                     &snapshotdv1.CollectRequest{DryRun: true, Tolerance: durationpb.New(90 * time.Minute)},
		"gc status":                                            &snapshotdv1.GetCollectorStatusRequest{},
		"gc explain a/b --store cold":                          &snapshotdv1.ExplainObjectRequest{Key: "a/b", Store: "cold"},
		"gc orphans":                                           &snapshotdv1.ListOrphansRequest{},
		"gc orphans --collection docs":                         &snapshotdv1.ListOrphansRequest{Collection: docs},
		"gc orphans --collection docs --delete --grace 2d":     &snapshotdv1.DeleteOrphansRequest{Collection: docs, Grace: durationpb.New(48 * time.Hour)},
		"gc orphans --collection docs --delete --grace 1h":     &snapshotdv1.DeleteOrphansRequest{Collection: docs, Grace: durationpb.New(time.Hour)},
		"gc orphans --collection docs --delete --grace 1h30m ": &snapshotdv1.DeleteOrphansRequest{Collection: docs, Grace: durationpb.New(90 * time.Minute)},
		"recover":         &snapshotdv1.RecoverRequest{},
		"recover --clock": &snapshotdv1.RecoverRequest{Clock: true},
	} {
		s := &server{answers: map[string][]any{
			"Collect": {&snapshotdv1.CollectResponse{Summary: cycleSummary()}}, "GetCollectorStatus": {&snapshotdv1.GetCollectorStatusResponse{}},
			"ExplainObject": {&snapshotdv1.ExplainObjectResponse{}}, "ListOrphans": {&snapshotdv1.ListOrphansResponse{}},
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

// What makes no sense is refused before the server is asked.
func TestGCUsage(t *testing.T) {
	for args, want := range map[string]string{
		"gc run --force":                                 "--force needs --collection: only for one collection at a time is it said that so much shall go",
		"gc run --objects":                               "--objects needs --dry-run; what a round has granted is in `snapshotctl reclaim list --files`",
		"gc run --dry-run --wait":                        "--wait and --dry-run exclude each other: a dry run deletes nothing that could be waited for",
		"gc run --tolerance -1s":                         "--tolerance -1s: it must not be negative",
		"gc run --collection #x":                         "\"x\" is no id: ids are positive numbers",
		"gc run --tolerance 3651d":                       "--tolerance 3651d: at most ten years, 3650d",
		"gc run --tolerance soon":                        "invalid argument \"soon\" for \"--tolerance\" flag: write a time span such as 36h or 30d",
		"gc run --sweep --collection d":                  "--sweep and --collection exclude each other: a sweep is about snapshotd's own prefixes, in all stores",
		"gc orphans --collection d --delete --grace 59m": "--grace 59m: at least 1h, for files are written before they are registered",
		"gc run --collection=":                           "--collection is empty: which collection?",
		"gc orphans --collection=":                       "--collection is empty: which collection?",
		"events --collection=":                           "--collection is empty: which collection?",
		"reclaim list --collection=":                     "--collection is empty: which collection?",
		"snapshot list --collection=":                    "--collection is empty: which collection?",
		"snapshot describe s --collection=":              "--collection is empty: which collection?",
		"gc run docs":                                    "\"docs\" is one argument too many",
		"gc explain":                                     "KEY is missing",
		"gc orphans --delete":                            "--delete needs --collection: under snapshotd's own prefixes the collector deletes by itself, and an engine's files go for one collection at a time",
		"gc orphans --delete --grace 2h":                 "--delete needs --collection: under snapshotd's own prefixes the collector deletes by itself, and an engine's files go for one collection at a time",
		"gc orphans --collection d --delete":             "--delete needs --grace: a file that is written and not registered yet is an orphan, too; give a time span, such as 24h, that is longer than a file ever stays so",
		"gc orphans --grace 2h":                          "--grace is for --delete; without it orphans of any age are listed",
		"recover now":                                    "\"now\" is one argument too many",
	} {
		s := &server{answers: map[string][]any{}}
		got := run(t, s, "", strings.Fields(args)...)
		if got.code != 2 || got.out != "" || !strings.HasPrefix(got.errOut, "error: "+want+"\n") {
			t.Errorf("%s: got %+v", args, got)
		}
		if len(s.requests) > 0 {
			t.Errorf("%s: asked the server", args)
		}
	}
}
