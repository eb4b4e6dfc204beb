// Package bugs lists bugs that this repository once had, each with the change that
// fixed it, a patch that undoes the fix, and a test that fails without it. So it
// stays known that those tests still find what they were written for. `make bugs`
// undoes each fix in turn, in a copy of the tree.
//
// Who changes the lines of a fix makes its patch anew; a test of this package tells
// which do not apply any more.
package bugs

import "embed"

// Bug is one bug that was fixed.
type Bug struct {
	Name    string // that of its patch, without .patch
	What    string // what went wrong, for people
	Fixed   string // the commit of the fix
	Package string // of the test, such as ./internal/gc
	Test    string // the one that fails without the fix
	Server  bool   // whether the test needs a server, which the build tag short leaves out
}

// Patch returns the patch that undoes the fix, in the form of diff -u.
func (b Bug) Patch() ([]byte, error) { return patches.ReadFile("patches/" + b.Name + ".patch") }

//go:embed patches/*.patch
var patches embed.FS

const (
	copyjob = "./internal/copyjob"
	gc      = "./internal/gc"
	manager = "./internal/manager"
	record  = "./internal/store/record"
	s3      = "./internal/store/object/s3"
)

// All are the bugs, the oldest first.
var All = []Bug{
	{
		Name: "name-resolved-twice", Fixed: "9606058", Package: manager, Test: "TestMinCutOfAnother",
		What: "a create waited for the cut of one collection and captured another that had its name since",
	},
	{
		Name: "far-expiry", Fixed: "8804206", Package: manager, Test: "TestFarExpiryIsRefused",
		What: "an expiry after 2262 lay in the past once it was stored: the snapshot was dropped at once",
	},
	{
		Name: "repeat-of-a-success", Fixed: "8804206", Package: manager, Test: "TestUpdateToken",
		What: "a repeat under a request token was told of an error that came of the first call's success",
	},
	{
		Name: "joined-create-compacted", Fixed: "8804206", Package: manager, Test: "TestJoinAfterCompaction",
		What: "a repeat that waited for the first create was told of a compaction",
	},
	{
		Name: "one-hiccup", Fixed: "8804206", Package: manager, Test: "TestOneHiccup",
		What: "a create was given up with the first read that had no answer",
	},
	{
		Name: "commit-dropped-before-read-back", Fixed: "8804206", Package: manager, Test: "TestCommitDroppedBeforeReadBack",
		What: "a commit without an answer whose snapshot was dropped before the read-back was told as failed",
	},
	{
		Name: "hung-store-holds-up-cleaning", Fixed: "8804206", Package: manager, Test: "TestHungDelete",
		What: "an object store that hung kept creates that had died from being cleaned up",
	},
	{
		Name: "truncated-read", Fixed: "8804206", Package: manager, Test: "TestTruncatedRead",
		What: "one short answer of the object store made a snapshot count as corrupt",
	},
	{
		Name: "lease-gone-before-begin", Fixed: "8804206", Package: manager, Test: "TestLeaseGoneBeforeBegin",
		What: "a create whose lease ran out before it began ended with an error that had no status",
	},
	{
		Name: "renamed-in-between", Fixed: "8804206", Package: manager, Test: "TestRenamedInBetween",
		What: "a collection that was renamed under a create had one name in the record and another in the metadata",
	},
	{
		Name: "deletes-beyond-the-cut", Fixed: "7c30525", Package: manager, Test: "TestCaptureDecides",
		What: "deletes whose timestamps are not known were captured without a row ceiling",
	},
	{
		Name: "shard-without-checkpoint", Fixed: "7c30525", Package: manager, Test: "TestChannelsWithoutCheckpoint",
		What: "a shard without a checkpoint was left out of the metadata, and the others moved up",
	},
	{
		Name: "counted-twice", Fixed: "778377b", Package: gc, Test: "TestSnapshotIsCountedOnce",
		What: "two loaders counted the references of one snapshot twice, and its segments were held for ever",
	},
	{
		Name: "target-not-empty", Fixed: "69cc8fa", Package: manager, Test: "TestRestoreTargetNotEmpty",
		What: "a restore wrote among objects that were there before, and rolling it back deleted them",
	},
	{
		Name: "cut-off-copy", Fixed: "69cc8fa", Package: s3, Test: "TestCopyWholeCanceled", Server: true,
		What: "a copy counted as over when its caller had gone, and was carried out later all the same",
	},
	{
		Name: "file-of-two-segments", Fixed: "d646a8d", Package: manager, Test: "TestFileOfTwoSegments",
		What: "a segment with the id of a field took another's file along when it was reclaimed",
	},
	{
		Name: "text-that-is-no-utf8", Fixed: "b451e3a", Package: record, Test: "TestClip",
		What: "an error whose text was no UTF-8 made the leader or a worker panic",
	},
	{
		Name: "uploads-by-a-slow-clock", Fixed: "30f2e65", Package: copyjob, Test: "TestLateUploads",
		What: "an upload that a worker left open stayed so for ever when the leader's clock was behind the store's",
	},
	{
		Name: "altered-note", Fixed: "787e019", Package: "./internal/store/epoch", Test: "TestAlteredNotes",
		What: "a digit altered on the way made another note of how far the metadata store had come",
	},
	{
		Name: "probe-that-died", Fixed: "b91de25", Package: gc, Test: "TestSweepRemovesProbes",
		What: "what a probe left in the bucket that was killed stayed there for ever",
	},
	{
		Name: "restore-and-altered-answers", Fixed: "8da5041", Package: manager, Test: "TestRestoreAndAlteredAnswers",
		What: "two altered answers in a row made a restore of a sound snapshot fail as of a corrupt one",
	},
	{
		Name: "create-and-altered-answers", Fixed: "8da5041", Package: manager, Test: "TestCreateAndAlteredAnswers",
		What: "a create whose answer was lost took an altered read-back for somebody else's object",
	},
	{
		Name: "cache-of-what-is-gone", Fixed: "8da5041", Package: manager, Test: "TestManifestCache",
		What: "the cache of manifests kept those of snapshots that were gone",
	},
	{
		Name: "repeat-that-cannot-look-again", Fixed: "120d096", Package: manager, Test: "TestRepeatThatCannotLookAgain",
		What: "a repeat that could not find out whether the first call was through was told of an error that came of that one's success",
	},
}
