package cli_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

func heldBySnapshot(id int64, name string, pins ...*snapshotdv1.Pin) *snapshotdv1.Holder {
	return &snapshotdv1.Holder{Holder: &snapshotdv1.Holder_Snapshot{Snapshot: &snapshotdv1.SnapshotHolder{
		SnapshotId: id, Name: name, Pins: pins,
	}}}
}

func heldByCreate(id int64) *snapshotdv1.Holder {
	return &snapshotdv1.Holder{Holder: &snapshotdv1.Holder_Creating{Creating: &snapshotdv1.SnapshotHolder{SnapshotId: id}}}
}

func heldByCatalog(segment int64) *snapshotdv1.Holder {
	return &snapshotdv1.Holder{Holder: &snapshotdv1.Holder_Catalog{Catalog: &snapshotdv1.CatalogHolder{
		SegmentId: segment,
	}}}
}

func segmentUnit(id int64) *snapshotdv1.Unit {
	return &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_SegmentId{SegmentId: id}}
}

func buildUnit(id int64) *snapshotdv1.Unit {
	return &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_IndexBuildId{IndexBuildId: id}}
}

func fileUnit(root int32, path string) *snapshotdv1.Unit {
	return &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_File{File: &snapshotdv1.UnitFile{Root: root, Path: path}}}
}

// tombstone returns a grant to a deleter.
func tombstone(id int64, deleter snapshotdv1.Deleter) *snapshotdv1.Tombstone {
	return &snapshotdv1.Tombstone{
		Id: id, CollectionId: 7, Kind: snapshotdv1.Tombstone_KIND_SEGMENT, SegmentId: id, Deleter: deleter,
		Caller:    "engine-1",
		GrantTime: timestamppb.New(now), FileCount: 5, Bytes: 5 << 10,
	}
}

const (
	bySnapshotd = snapshotdv1.Deleter_DELETER_SNAPSHOTD
	byCaller    = snapshotdv1.Deleter_DELETER_CALLER
	isGranted   = snapshotdv1.ReclaimResult_OUTCOME_GRANTED
	isHeld      = snapshotdv1.ReclaimResult_OUTCOME_HELD
	isUnknown   = snapshotdv1.ReclaimResult_OUTCOME_UNKNOWN
)

func TestReclaimOutput(t *testing.T) {
	listed := tombstone(101, byCaller)
	listed.Files = []*snapshotdv1.TombstoneFile{{Store: "default", Key: "engine/7/8/101/insert/100/1", Size: 5 << 10}}
	list := map[string][]any{"ListTombstones": {
		&snapshotdv1.ListTombstonesResponse{
			Tombstones: []*snapshotdv1.Tombstone{tombstone(100, bySnapshotd)}, NextPageToken: "2",
		},
		&snapshotdv1.ListTombstonesResponse{Tombstones: []*snapshotdv1.Tombstone{listed}},
	}}
	for _, tc := range []struct {
		name    string
		answers map[string][]any
		args    string
		want    string
	}{
		{
			"check",
			map[string][]any{"CheckReferences": {&snapshotdv1.CheckReferencesResponse{Units: []*snapshotdv1.UnitReferences{
				{
					State: snapshotdv1.UnitReferences_STATE_DROPPED, HolderCount: 12,
					Holders: []*snapshotdv1.Holder{heldBySnapshot(42, "nightly"), heldByCreate(43)},
				},
				{State: snapshotdv1.UnitReferences_STATE_LIVE, HolderCount: 1, Holders: []*snapshotdv1.Holder{heldByCatalog(102)}},
				{State: snapshotdv1.UnitReferences_STATE_UNKNOWN},
				{State: snapshotdv1.UnitReferences_STATE_GRANTED, Tombstone: tombstone(103, byCaller)},
			}}}},
			"reclaim check --collection docs --segment 101,102 --build 201 --path a/b",
			`
UNIT         STATE    HOLDERS  HELD BY
segment 101  DROPPED  12       nightly, #43 (being created), 10 more
segment 102  LIVE     1        the collection
build 201    UNKNOWN  0        -
file a/b     GRANTED  0        -
`,
		},
		{
			"request for a caller",
			map[string][]any{"Reclaim": {&snapshotdv1.ReclaimResponse{Results: []*snapshotdv1.ReclaimResult{
				{Outcome: isGranted, Tombstone: tombstone(101, byCaller)},
				{Outcome: isHeld, HolderCount: 1, Holders: []*snapshotdv1.Holder{heldBySnapshot(42, "nightly")}},
				{Outcome: isUnknown},
				{Outcome: isGranted, Tombstone: tombstone(101, byCaller)}, // the same unit, named by a file
			}}}},
			"reclaim request --collection #7 --segment 101 --segment 102 --segment 103 --path 7/8/101/insert/100/1 " +
				"--deleter caller",
			`
UNIT                       OUTCOME  TOMBSTONE  DELETER  FILES  SIZE     HELD BY
segment 101                GRANTED  101        caller   5      5.0 KiB  -
segment 102                HELD     -          -        -      -        nightly
segment 103                UNKNOWN  -          -        -      -        -
file 7/8/101/insert/100/1  GRANTED  101        caller   5      5.0 KiB  -
to be deleted by you: 5 files, 5.0 KiB; list them with ` +
				"`snapshotctl reclaim list --collection '#7' --deleter caller --files`" + `
then: snapshotctl reclaim confirm --collection '#7' TOMBSTONE...
held: 1 unit; request again when their holders are gone
`,
		},
		{
			"request for snapshotd",
			map[string][]any{"Reclaim": {&snapshotdv1.ReclaimResponse{Results: []*snapshotdv1.ReclaimResult{
				{Outcome: isGranted, Tombstone: tombstone(101, bySnapshotd)},
			}}}},
			"reclaim request --collection docs --segment 101 --deleter snapshotd",
			`
UNIT         OUTCOME  TOMBSTONE  DELETER    FILES  SIZE     HELD BY
segment 101  GRANTED  101        snapshotd  5      5.0 KiB  -
snapshotd deletes 5 files, 5.0 KiB
`,
		},
		{
			"request as JSON",
			map[string][]any{"Reclaim": {&snapshotdv1.ReclaimResponse{Results: []*snapshotdv1.ReclaimResult{{
				Outcome: isUnknown,
			}}}}},
			"reclaim request --collection docs --segment 101 --deleter snapshotd -o json",
			`
{
  "results": [
    {
      "outcome": "OUTCOME_UNKNOWN"
    }
  ]
}
`,
		},
		{
			"confirm",
			map[string][]any{"ConfirmReclaimed": {&snapshotdv1.ConfirmReclaimedResponse{Results: []*snapshotdv1.ConfirmResult{
				{TombstoneId: 101, Outcome: snapshotdv1.ConfirmResult_OUTCOME_CONFIRMED},
				{TombstoneId: 102, Outcome: snapshotdv1.ConfirmResult_OUTCOME_UNKNOWN},
			}}}},
			"reclaim confirm --collection docs 101 102",
			`
TOMBSTONE  OUTCOME
101        CONFIRMED
102        UNKNOWN
`,
		},
		{
			"list", list, "reclaim list",
			`
TOMBSTONE  COLLECTION  KIND     SEGMENT  DELETER    CALLER    GRANTED               FILES  SIZE
100        #7          segment  100      snapshotd  engine-1  2026-03-01T12:00:00Z  5      5.0 KiB
101        #7          segment  101      caller     engine-1  2026-03-01T12:00:00Z  5      5.0 KiB
`,
		},
		{
			"files",
			map[string][]any{"ListTombstones": {&snapshotdv1.ListTombstonesResponse{
				Tombstones: []*snapshotdv1.Tombstone{listed},
			}}},
			"reclaim list --files",
			`
TOMBSTONE  COLLECTION  SIZE     STORE    KEY
101        #7          5.0 KiB  default  engine/7/8/101/insert/100/1
`,
		},
		{
			"drop, dry run",
			map[string][]any{"DropSnapshot": {&snapshotdv1.DropSnapshotResponse{
				SnapshotId: 42,
				Usage: &snapshotdv1.SnapshotUsage{
					ExclusiveFiles: 12, ExclusiveBytes: 34 << 20, SharedFiles: 1, SharedBytes: 5,
				},
			}}},
			"snapshot drop nightly --dry-run",
			`
dry run: snapshot nightly (id 42) could be dropped; nothing was
would free 12 files, 34.0 MiB
would keep 1 file, 5 B: held by the collection, another snapshot or a grant, or not snapshotd's to delete
`,
		},
		{
			"drop of nothing, dry run",
			map[string][]any{"DropSnapshot": {&snapshotdv1.DropSnapshotResponse{}}},
			"snapshot drop nightly --dry-run",
			"\nno such snapshot\n",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answers := map[string][]any{}
			maps.Copy(answers, tc.answers)
			got := run(t, &server{answers: answers}, "", strings.Fields(tc.args)...)
			if diff := cmp.Diff(result{out: tc.want[1:]}, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestReclaimUnits checks that units come from flags and from a file, in as many calls
// as needed.
func TestReclaimUnits(t *testing.T) {
	lines := `{"segmentId": "5"}

{"indexBuildId": 6}
{"file": {"root": 1, "path": "x/y", "segmentId": 9}}
`
	file := filepath.Join(t.TempDir(), "units.jsonl")
	if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	inFile := []*snapshotdv1.Unit{segmentUnit(5), buildUnit(6), fileUnit(1, "x/y")}
	inFile[2].GetFile().SegmentId = 9
	answers := func() map[string][]any {
		return map[string][]any{"CheckReferences": {&snapshotdv1.CheckReferencesResponse{}}}
	}
	for _, tc := range []struct {
		name, stdin string
		args        []string
		want        []*snapshotdv1.Unit
	}{
		{
			"flags", "",
			[]string{"--path", "a/b", "--root", "2", "--build", "3", "--segment", "1,2", "--path", "c"},
			[]*snapshotdv1.Unit{segmentUnit(1), segmentUnit(2), buildUnit(3), fileUnit(2, "a/b"), fileUnit(2, "c")},
		},
		{"a file", "", []string{"-f", file}, inFile},
		{"standard input", lines, []string{"-f", "-"}, inFile},
		{"both", lines, []string{"-f", "-", "--segment", "1"}, append([]*snapshotdv1.Unit{segmentUnit(1)}, inFile...)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &server{answers: answers()}
			if got := run(
				t, s, tc.stdin, append([]string{"reclaim", "check", "--collection", "#7"}, tc.args...)...,
			); got.code != 0 {
				t.Fatal(got.errOut)
			}
			want := []proto.Message{&snapshotdv1.CheckReferencesRequest{
				Collection: &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: 7}}, Units: tc.want,
			}}
			if diff := cmp.Diff(want, s.requests, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("many", func(t *testing.T) {
		var b strings.Builder
		for id := range 25_000 {
			fmt.Fprintf(&b, "{\"segmentId\": %d}\n", id+1)
		}
		s := &server{answers: answers()}
		if got := run(t, s, b.String(), "reclaim", "check", "--collection", "docs", "-f", "-"); got.code != 0 {
			t.Fatal(got.errOut)
		}
		next := int64(1)
		for _, r := range s.requests {
			us := r.(*snapshotdv1.CheckReferencesRequest).GetUnits()
			if len(us) > 10_000 {
				t.Errorf("a call with %d units", len(us))
			}
			for _, u := range us {
				if u.GetSegmentId() != next {
					t.Fatalf("got segment %d, want %d", u.GetSegmentId(), next)
				}
				next++
			}
		}
		if next != 25_001 || len(s.requests) != 3 {
			t.Errorf("%d units in %d calls", next-1, len(s.requests))
		}
	})
	t.Run("long paths", func(t *testing.T) {
		s := &server{answers: answers()}
		line := fmt.Sprintf("{\"file\": {\"path\": %q}}\n", strings.Repeat("x", 1024))
		if got := run(
			t, s, strings.Repeat(line, 3000), "reclaim", "check", "--collection", "docs", "-f", "-",
		); got.code != 0 {
			t.Fatal(got.errOut)
		}
		for _, r := range s.requests {
			if n := proto.Size(r); n > 1<<20 {
				t.Errorf("a message of %d bytes", n)
			}
		}
	})
}

func TestReclaimErrors(t *testing.T) {
	for _, tc := range []struct {
		name, stdin, args string
		answer            any
		want              result
	}{
		{
			"no units", "", "reclaim check --collection docs", nil,
			result{
				code:   2,
				errOut: "error: no units: use --segment, --build, --path or -f\nhint: see `snapshotctl reclaim check --help`\n",
			},
		},
		{
			"no deleter", "", "reclaim request --collection docs --segment 1", nil,
			result{
				code:   2,
				errOut: "error: --deleter is missing: use snapshotd or caller\nhint: see `snapshotctl reclaim request --help`\n",
			},
		},
		{
			"another deleter", "", "reclaim request --collection docs --segment 1 --deleter me", nil,
			result{
				code:   2,
				errOut: "error: --deleter \"me\": use snapshotd or caller\nhint: see `snapshotctl reclaim request --help`\n",
			},
		},
		{
			"a bad line", "{\"segmentId\": 1}\n{\"segment\": 1}", "reclaim check --collection docs -f -", nil,
			result{
				code: 2,
				errOut: "error: standard input, line 2: column 2: unknown field \"segment\"\n" +
					"hint: see `snapshotctl reclaim check --help`\n",
			},
		},
		{
			"an empty line", "{}", "reclaim check --collection docs -f -", nil,
			result{
				code: 2,
				errOut: `error: standard input, line 1: no unit: use {"segmentId": 101}, {"indexBuildId": 7} or ` +
					`{"file": {"path": "7/8/101/insert/100/1"}}` + "\nhint: see `snapshotctl reclaim check --help`\n",
			},
		},
		{
			"nothing to confirm", "", "reclaim confirm --collection docs", nil,
			result{
				code: 2,
				errOut: "error: TOMBSTONE is missing; `snapshotctl reclaim list` lists them\n" +
					"hint: see `snapshotctl reclaim confirm --help`\n",
			},
		},
		{
			"not the caller's", "", "reclaim confirm --collection docs 101,101",
			&snapshotdv1.ConfirmReclaimedResponse{Results: []*snapshotdv1.ConfirmResult{{
				TombstoneId: 101, Outcome: snapshotdv1.ConfirmResult_OUTCOME_FOREIGN,
			}}},
			result{
				code: 5, out: "TOMBSTONE  OUTCOME\n101        FOREIGN\n",
				errOut: "error: snapshotd is the deleter of 1 tombstone\n" +
					"hint: it confirms them by itself; list them with `snapshotctl reclaim list --deleter snapshotd`\n",
			},
		},
		{
			"unreadable references", "", "reclaim check --collection docs --segment 1",
			answer(t, codes.FailedPrecondition, "REFERENCES_UNREADABLE", "references of snapshot \"x\" (42)"),
			result{
				code: 5,
				errOut: "error: references of snapshot \"x\" (42)\nreason: REFERENCES_UNREADABLE\n" +
					"hint: nothing of the collection is reclaimed until the snapshot that the message names is readable again or " +
					"dropped; see it with `snapshotctl snapshot get '#ID'`\n",
			},
		},
		{
			"neither segment nor file", "", "explain --collection docs", nil,
			result{code: 2, errOut: "error: SEGMENT_ID or FILE_PATH is missing\nhint: see `snapshotctl explain --help`\n"},
		},
		{
			"a segment and a build", "", "explain --collection docs 1 --build 2", nil,
			result{code: 2, errOut: "error: --build and \"1\" exclude each other\nhint: see `snapshotctl explain --help`\n"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &server{answers: map[string][]any{}}
			if tc.answer != nil {
				s.answers["ConfirmReclaimed"], s.answers["CheckReferences"] = []any{tc.answer}, []any{tc.answer}
			}
			got := run(t, s, tc.stdin, strings.Fields(tc.args)...)
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestExplain(t *testing.T) {
	nightly := heldBySnapshot(42, "nightly",
		&snapshotdv1.Pin{
			Owner: "backup", Reason: "export", ExpireTime: timestamppb.New(now.Add(time.Hour)),
		}, &snapshotdv1.Pin{Owner: "audit"})
	gone := collection()
	gone.State = snapshotdv1.Collection_STATE_DROPPING
	const (
		dropped = snapshotdv1.UnitReferences_STATE_DROPPED
		live    = snapshotdv1.UnitReferences_STATE_LIVE
		unknown = snapshotdv1.UnitReferences_STATE_UNKNOWN
	)
	holders := func(hs ...*snapshotdv1.Holder) *snapshotdv1.UnitReferences {
		return &snapshotdv1.UnitReferences{State: dropped, Holders: hs, HolderCount: int64(len(hs))}
	}
	for _, tc := range []struct {
		name       string
		collection *snapshotdv1.Collection
		args       string
		units      []*snapshotdv1.UnitReferences
		want       string
	}{
		{
			"held", nil, "101",
			[]*snapshotdv1.UnitReferences{holders(heldBySnapshot(42, "nightly"))},
			`
segment 101 was dropped from default/docs (7).
It is held by snapshot nightly (42).
It can be deleted after that snapshot is dropped: snapshotctl snapshot drop '#42'
`,
		},
		{
			"held and pinned", nil, "101",
			[]*snapshotdv1.UnitReferences{holders(nightly)},
			`
segment 101 was dropped from default/docs (7).
It is held by snapshot nightly (42), pinned by backup (export) until 2026-03-01T13:00:00Z, by audit until it is removed.
It can be deleted after that snapshot is dropped: snapshotctl snapshot drop '#42'
A pinned snapshot cannot be dropped until its pins expire or are removed; see ` + "`snapshotctl pin list`" + `.
`,
		},
		{
			"held by several", nil, "101",
			[]*snapshotdv1.UnitReferences{{
				State: dropped, HolderCount: 11,
				Holders: []*snapshotdv1.Holder{heldBySnapshot(42, "nightly"), heldBySnapshot(41, "a"), heldByCreate(43)},
			}},
			`
segment 101 was dropped from default/docs (7).
It is
  - held by snapshot nightly (42)
  - held by snapshot a (41)
  - possibly held by a snapshot that is being created (43)
  - held by 8 more
It can be deleted when nothing holds it any more. To drop the snapshots:
  snapshotctl snapshot drop '#42'
  snapshotctl snapshot drop '#41'
`,
		},
		{
			"held by a create", nil, "--build 201",
			[]*snapshotdv1.UnitReferences{holders(heldByCreate(43))},
			`
build 201 was dropped from default/docs (7).
It is possibly held by a snapshot that is being created (43).
It can be deleted if no snapshot that is being created holds it in the end; retry when they are complete.
`,
		},
		{
			"not held", nil, "7/8/101/insert/100/1",
			[]*snapshotdv1.UnitReferences{holders()},
			`
file 7/8/101/insert/100/1 was dropped from default/docs (7).
Nothing holds it. To delete it: snapshotctl reclaim request --collection docs --path 7/8/101/insert/100/1 ` +
				`--deleter snapshotd
`,
		},
		{
			"a key", nil, "engine/7/8/101/insert/100/1",
			[]*snapshotdv1.UnitReferences{
				{State: unknown},
				{State: live, HolderCount: 2, Holders: []*snapshotdv1.Holder{heldByCatalog(101), heldBySnapshot(42, "nightly")}},
			},
			`
file 7/8/101/insert/100/1, of segment 101, is part of default/docs (7).
It is also held by snapshot nightly (42).
It can be deleted after it is dropped or replaced: snapshotctl catalog drop-segments --collection docs 101
`,
		},
		{
			"granted to a caller", nil, "101",
			[]*snapshotdv1.UnitReferences{{
				State: snapshotdv1.UnitReferences_STATE_GRANTED, Tombstone: tombstone(101, byCaller),
			}},
			`
segment 101 was dropped from default/docs (7). No snapshot needs it.
It was granted to caller engine-1 at 2026-03-01T12:00:00Z, and the delete is not confirmed: 5 files, 5.0 KiB.
After deleting them: snapshotctl reclaim confirm --collection docs 101
`,
		},
		{
			"granted to snapshotd", nil, "101",
			[]*snapshotdv1.UnitReferences{{
				State: snapshotdv1.UnitReferences_STATE_GRANTED, Tombstone: tombstone(101, bySnapshotd),
			}},
			`
segment 101 was dropped from default/docs (7). No snapshot needs it.
It was granted to snapshotd at 2026-03-01T12:00:00Z, which deletes it: 5 files, 5.0 KiB.
`,
		},
		{
			"unknown", nil, "x/y\tz",
			[]*snapshotdv1.UnitReferences{{State: unknown}},
			`
file "x/y\tz" is unknown in default/docs (7): never registered, or reclaimed and confirmed.
snapshotd never grants an unknown unit; whether to delete it is up to you.
`,
		},
		{
			"a build that may be live", nil, "--build 201",
			[]*snapshotdv1.UnitReferences{{
				State: unknown, HolderCount: 1, Holders: []*snapshotdv1.Holder{heldBySnapshot(42, "nightly")},
			}},
			`
build 201 is unknown in default/docs (7): never registered, or reclaimed and confirmed.
It may still be part of the collection: check its segment or one of its files.
It is held by snapshot nightly (42).
`,
		},
		{
			"as JSON", nil, "engine/7/8/101/insert/100/1 -o json",
			[]*snapshotdv1.UnitReferences{{State: unknown}, {State: dropped}},
			`
{
  "units": [
    {
      "state": "STATE_DROPPED"
    }
  ]
}
`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.collection == nil {
				tc.collection = collection()
			}
			s := &server{answers: map[string][]any{
				"GetCollection":   {&snapshotdv1.GetCollectionResponse{Collection: tc.collection}},
				"CheckReferences": {&snapshotdv1.CheckReferencesResponse{Units: tc.units}},
			}}
			args := strings.Split(strings.ReplaceAll("explain --collection docs "+tc.args, " ", "\n"), "\n")
			got := run(t, s, "", args...)
			if diff := cmp.Diff(result{out: tc.want[1:]}, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestExplainCandidates checks that a file is found by its path in any root and by its
// key.
func TestExplainCandidates(t *testing.T) {
	col := collection()
	col.Roots = append(col.Roots, &snapshotdv1.Root{Store: "cold", Prefix: ""})
	for args, want := range map[string][]*snapshotdv1.Unit{
		"101":                 {segmentUnit(101)},
		"--build 201":         {buildUnit(201)},
		"7/8/101/x":           {fileUnit(0, "7/8/101/x"), fileUnit(1, "7/8/101/x")},
		"engine/7/x":          {fileUnit(0, "engine/7/x"), fileUnit(1, "engine/7/x"), fileUnit(0, "7/x")},
		"engine/7/x --root 0": {fileUnit(0, "engine/7/x"), fileUnit(0, "7/x")},
		"engine/7/x --root 1": {fileUnit(1, "engine/7/x")},
	} {
		s := &server{answers: map[string][]any{
			"GetCollection": {&snapshotdv1.GetCollectionResponse{Collection: col}},
			"CheckReferences": {&snapshotdv1.CheckReferencesResponse{Units: []*snapshotdv1.UnitReferences{{
				State: snapshotdv1.UnitReferences_STATE_UNKNOWN,
			}}}},
		}}
		if got := run(t, s, "", strings.Fields("explain --collection docs "+args)...); got.code != 0 {
			t.Errorf("%s: %s", args, got.errOut)
			continue
		}
		if diff := cmp.Diff(
			want, s.requests[1].(*snapshotdv1.CheckReferencesRequest).GetUnits(), protocmp.Transform(),
		); diff != "" {
			t.Errorf("%s: %s", args, diff)
		}
	}
	s := &server{answers: map[string][]any{"GetCollection": {&snapshotdv1.GetCollectionResponse{Collection: col}}}}
	if got := run(
		t, s, "", "explain", "--collection", "docs", "x", "--root", "2",
	); got.code != 2 || !strings.HasPrefix(got.errOut, "error: --root 2: default/docs has 2 roots\n") {
		t.Errorf("got %+v", got)
	}
}

// TestDescribeUsage checks that a description has the usage, or is shown without it.
func TestDescribeUsage(t *testing.T) {
	with := &snapshotdv1.DescribeSnapshotResponse{
		Snapshot: snapshot(), Collection: collection(),
		Usage: &snapshotdv1.SnapshotUsage{ExclusiveFiles: 3, ExclusiveBytes: 1 << 20, SharedFiles: 9, SharedBytes: 4 << 20},
	}
	without := proto.CloneOf(with)
	without.Usage = nil
	damaged, unlisted := proto.CloneOf(without), proto.CloneOf(without)
	damaged.Damage = []string{"manifest-0.avro is missing"}
	unlisted.DamageUnknown = "the object store did not answer"
	for _, tc := range []struct {
		name    string
		answers []any
		want    string
	}{
		{
			"known",
			[]any{with},
			"holds: 12 files, 5.0 MiB\nheld by it alone: 3 files, 1.0 MiB; the others have other holders\nto undo:",
		},
		{
			"unknown",
			[]any{answer(t, codes.FailedPrecondition, "REFERENCES_UNREADABLE", "references of snapshot \"x\" (41)"), without},
			"holds: 12 files, 5.0 MiB\nheld by it alone: unknown: references of snapshot \"x\" (41)\nto undo:",
		},
		{
			"damaged",
			[]any{answer(t, codes.DataLoss, "SNAPSHOT_CORRUPT", "manifest-0.avro is missing"), damaged},
			"DAMAGED: manifest-0.avro is missing\n\nholds: 12 files, 5.0 MiB\n" +
				"held by it alone: unknown: manifest-0.avro is missing\nto undo:",
		},
		{
			"not listed",
			[]any{unlisted},
			"damage check failed: the object store did not answer\n\nholds: 12 files, 5.0 MiB\nto undo:",
		},
		{"an older server", []any{without}, "holds: 12 files, 5.0 MiB\nto undo:"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &server{answers: map[string][]any{"DescribeSnapshot": tc.answers}}
			got := run(t, s, "", "snapshot", "describe", "nightly")
			if got.code != 0 || !strings.Contains(got.out, tc.want) {
				t.Errorf("got %+v", got)
			}
			if !s.requests[0].(*snapshotdv1.DescribeSnapshotRequest).GetIncludeUsage() {
				t.Error("the usage was not requested")
			}
		})
	}
}
