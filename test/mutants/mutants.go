// Package mutants lists defects and the tests that find them. A mutant is a patch
// that puts one defect into a copy of the tree. A planted mutant is a mistake that
// someone could make: a compare that is left out, an answer that is believed. A
// regression undoes the fix of a defect that this repository once had. `make
// mutants` applies each patch in turn and requires that a test fails.
//
// A change to the lines of a patch needs a new patch: TestPatchesApply names the
// patches that no longer apply.
package mutants

import (
	"embed"
	"slices"
)

// Mutant is one defect.
type Mutant struct {
	Name   string // of its patch, without .patch
	Breaks string // the consequence of the defect
	Fixed  string // the commit that fixed a regression; empty: planted
	Tests  []Tests
}

// Tests are tests of one package, at least one of which fails with the mutant.
type Tests struct {
	Package string // such as ./internal/gc
	Run     string // as in go test -run
	Server  bool   // whether they need a server, which the build tag short excludes
}

// Patch returns the patch that puts the defect into the tree, in the form of diff -u.
func (m Mutant) Patch() ([]byte, error) { return patches.ReadFile("patches/" + m.Name + ".patch") }

//go:embed patches/*.patch
var patches embed.FS

const (
	copyjob  = "./internal/copyjob"
	election = "./internal/store/meta/election"
	epoch    = "./internal/store/epoch"
	gc       = "./internal/gc"
	gcRefs   = "./internal/gc/refs"
	collect  = "./internal/gc/collect"
	manager  = "./internal/manager"
	manifest = "./internal/store/manifest"
	record   = "./internal/store/record"
	s3       = "./internal/store/object/s3"
	snapshot = "./internal/snapshot"
)

// All returns the mutants: the planted ones, then the regressions.
func All() []Mutant { return slices.Concat(planted, regressions) }

// inMemory are tests that need no server.
func inMemory(pkg, run string) Tests { return Tests{Package: pkg, Run: run} }

// planted are ordered by the rule that they break. Tests are ordered by cost.
var planted = []Mutant{
	{Name: "fence-not-compared", Breaks: "a deposed leader continues to write", Tests: []Tests{
		inMemory(election, "^TestElection$"), inMemory(manager, "^(TestRemovalIsFenced|TestZombieLeader)$"),
	}},
	{Name: "grant-under-pending-create", Breaks: "files that a pending create captured are deleted", Tests: []Tests{
		inMemory(manager, "^(TestOnlyOlderCreatesHold|TestGrantComparesItsPreconditions)$"),
		inMemory(manager, "^TestNothingNeededIsEverDeleted$"),
	}},
	{Name: "grant-before-the-commit", Breaks: "progress is taken for the commits that it covers", Tests: []Tests{
		inMemory(manager, "^TestGrantWaitsForTheCommit$"),
	}},
	{
		Name:   "capture-before-pending-key",
		Breaks: "a snapshot holds segments that were dropped before its pending key",
		Tests: []Tests{
			inMemory(manager, "^TestCaptureFollowsThePendingKey$"),
			inMemory(manager, "^TestNothingNeededIsEverDeleted$"),
		},
	},
	{Name: "failed-delete-revives-segment", Breaks: "a segment is live while its files are being deleted", Tests: []Tests{
		inMemory(manager, "^TestFailedDeleteIsRetried$"),
		inMemory(manager, "^TestNothingNeededIsEverDeleted$"),
	}},
	{Name: "restore-pin-under-lease", Breaks: "the source of a restore can be dropped once a lease ends", Tests: []Tests{
		inMemory(manager, "^(TestRestorePins|TestRestoreWithStoreDown)$"),
	}},
	{
		Name:   "restored-collection-active-early",
		Breaks: "a collection is visible when half of it is restored",
		Tests: []Tests{
			inMemory(manager, "^(TestRestoringCollectionIsInaccessible|TestRestoreCanceledBetweenWrites)$"),
		},
	},
	{Name: "foreign-object-adopted", Breaks: "a snapshot is committed with an object of another writer", Tests: []Tests{
		inMemory(manager, "^TestForeignObjectIsNotOverwritten$"),
	}},
	{Name: "own-write-not-recognized", Breaks: "a write that happened fails because its answer was lost", Tests: []Tests{
		{Package: s3, Run: "^TestCreateLostResponse$", Server: true},
	}},
	{Name: "copy-without-etag-believed", Breaks: "a copy that may not have happened counts as made", Tests: []Tests{
		{Package: s3, Run: "^TestFaults$/200", Server: true},
	}},
	{Name: "drop-ignores-pins", Breaks: "a snapshot is dropped while a restore reads it", Tests: []Tests{
		inMemory(manager, "^(TestRestorePins|TestDropOfPinnedIsRefused)$"),
	}},
	{Name: "digest-not-compared", Breaks: "objects that were altered in the bucket are believed", Tests: []Tests{
		inMemory(manifest, "^TestDigest"), inMemory(manager, "^TestCorruptSnapshotIsReported$"),
	}},
	{Name: "age-by-local-clock", Breaks: "an object younger than the grace period is deleted", Tests: []Tests{
		inMemory(collect, "^TestSweepTakes$"),
	}},
	{Name: "token-ignored", Breaks: "a repeated call takes effect twice", Tests: []Tests{
		inMemory(manager, "^TestCreateTokens$"),
	}},
	{Name: "renewal-of-another-believed", Breaks: "the renewal of another caller counts as one's own", Tests: []Tests{
		inMemory(manager, "^(TestRenewal|TestLateRenewal)"),
	}},
	{Name: "rollback-leaves-uploads", Breaks: "a failed restore leaves unfinished uploads", Tests: []Tests{
		inMemory(manager, "^TestRollBackAbortsUploads$"),
	}},
}

// regression is a mutant that one test finds.
func regression(name, fixed, pkg, test, breaks string) Mutant {
	return Mutant{Name: name, Breaks: breaks, Fixed: fixed, Tests: []Tests{inMemory(pkg, "^"+test+"$")}}
}

// onServer marks the tests of a mutant as in need of a server.
func onServer(m Mutant) Mutant {
	for i := range m.Tests {
		m.Tests[i].Server = true
	}
	return m
}

// regressions are ordered by age, the oldest first.
var regressions = []Mutant{
	regression("name-resolved-twice", "9606058", manager, "TestMinCutResolvesNameOnce",
		"a create waits for the cut of one collection and captures another that took its name"),
	regression("far-expiry", "8804206", manager, "TestFarExpiryIsRefused",
		"an expiry after 2262 overflows into the past: the snapshot is dropped at once"),
	regression("repeat-of-a-success", "8804206", manager, "TestUpdateToken",
		"a repeat under a request token gets an error that the first call's success caused"),
	regression("wait-compacted", "57048bb", manager, "TestWaitsOutliveTheirWatch",
		"a call that waits for a checkpoint waits for ever after a compaction"),
	regression("one-hiccup", "8804206", manager, "TestTransientReadError",
		"one read without an answer aborts a create"),
	regression("commit-dropped-before-read-back", "8804206", manager, "TestCommitDroppedBeforeReadBack",
		"a commit without an answer fails when the snapshot is dropped before the read-back"),
	regression("hung-store-holds-up-cleaning", "8804206", manager, "TestHungDelete",
		"an object store that hangs stops the cleaning of dead creates"),
	regression("truncated-read", "8804206", manager, "TestTruncatedRead",
		"one short answer of the object store marks a snapshot as corrupt"),
	regression("lease-gone-before-begin", "8804206", manager, "TestLeaseGoneBeforeBegin",
		"a create whose lease expires before it begins ends with an error without a status"),
	regression("renamed-in-between", "8804206", manager, "TestRenamedInBetween",
		"a collection renamed during a create has one name in the record and another in the metadata"),
	regression("deletes-beyond-the-cut", "7c30525", manager, "TestCaptureDecides",
		"deletes with unknown timestamps are captured without a row ceiling"),
	regression("shard-without-checkpoint", "7c30525", manager, "TestChannelsWithoutCheckpoint",
		"a shard without a checkpoint is missing from the metadata, and later shards take its place"),
	regression("counted-twice", "778377b", gcRefs, "TestSnapshotIsCountedOnce",
		"two loaders count the references of one snapshot twice: its segments are held for ever"),
	regression("target-not-empty", "69cc8fa", manager, "TestRestoreTargetNotEmpty",
		"a restore writes among existing objects, and its rollback deletes them"),
	onServer(regression("cut-off-copy", "69cc8fa", s3, "TestCopyWholeCanceled",
		"a canceled copy counts as ended and takes effect later")),
	regression("file-of-two-segments", "d646a8d", manager, "TestFileOfTwoSegments",
		"reclaiming a segment with the id of a field deletes the file of another segment"),
	regression("text-that-is-no-utf8", "b451e3a", record, "TestClip",
		"an error text that is not UTF-8 makes the leader or a worker panic"),
	regression("uploads-by-a-slow-clock", "30f2e65", copyjob, "TestUploadCutoff",
		"an upload that a worker left open stays for ever when the leader's clock is behind the store's"),
	regression("altered-mark", "787e019", epoch, "TestAlteredMarks",
		"a digit altered in transit makes a different valid high-water mark"),
	regression("probe-that-died", "b91de25", collect, "TestSweepRemovesProbes",
		"objects of a killed probe stay in the bucket for ever"),
	regression("restore-and-altered-answers", "8da5041", manager, "TestRestoreWithAlteredReads",
		"two altered answers in a row fail the restore of an intact snapshot as corrupt"),
	regression("create-and-altered-answers", "8da5041", manager, "TestCreateAndAlteredAnswers",
		"a create whose answer was lost takes an altered read-back for the object of another writer"),
	regression("cache-of-what-is-gone", "8da5041", snapshot, "TestManifestCache",
		"the cache of manifests keeps those of removed snapshots"),
	regression("repeat-that-cannot-look-again", "120d096", manager, "TestRepeatWithUnreadableToken",
		"a repeat that cannot look up the first call gets an error that the first call's success caused"),
	onServer(regression("layout-taken-for-altered", "6eeb272", manager, "TestStoreOfOtherETags",
		"files of a bucket that was copied in other parts are reported as altered")),
	onServer(regression("condition-of-copies-trusted", "e1f8fd9", manager, "TestCopyConditionIgnoredLater",
		"a restore copies an altered file where the store has ceased to honour conditions")),
}
