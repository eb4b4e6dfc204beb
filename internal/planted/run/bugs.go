package main

import "time"

// layer is a kind of tests, and those of it that are asked for a bug.
type layer struct {
	name  string // one word
	pkg   string
	run   string // as go test's -run
	short bool   // whether the build tag short leaves out what needs a server
	most  time.Duration
}

// timeout bounds the tests of the layer: a minute, unless it says otherwise.
func (l layer) timeout() time.Duration {
	if l.most > 0 {
		return l.most
	}
	return time.Minute
}

// unit are tests in memory, most of them in virtual time.
func unit(pkg, run string) layer {
	return layer{name: "unit", pkg: "./internal/" + pkg, run: run, short: true}
}

// server are tests with a real object store behind a proxy that fails.
func server(pkg, run string) layer {
	return layer{name: "server", pkg: "./internal/" + pkg, run: run}
}

// property are tests that draw what happens.
func property(pkg, run string) layer {
	return layer{name: "property", pkg: "./internal/" + pkg, run: run, short: true}
}

// simulation is asked last of all, for every bug, once it is there.
var simulation = layer{name: "simulation", pkg: "./internal/sim", run: ".", short: true, most: 90 * time.Second}

// bug is one that can be planted: the tag planted_<name> does.
type bug struct {
	name   string
	breaks string // what of what is promised
	layers []layer
}

// bugs are all there are, each with the tests that find it, the cheapest first.
var bugs = []bug{
	{"p1", "a leader that was deposed goes on writing", []layer{
		unit("store/meta/election", "^TestElection$"), unit("manager", "^(TestRemovalIsFenced|TestZombieLeader)$"),
	}},
	{"p2", "files are deleted that a create has seen", []layer{
		unit("manager", "^(TestOnlyOlderCreatesHold|TestGrantComparesItsPremises)$"),
		property("manager", "^TestNothingNeededIsEverDeleted$"),
	}},
	{"p3", "a snapshot holds what was dropped before its pending key", []layer{
		unit("manager", "^TestCaptureFollowsThePendingKey$"),
		property("manager", "^TestNothingNeededIsEverDeleted$"),
	}},
	{"p4", "a segment whose files are being deleted is live again", []layer{
		unit("manager", "^TestDeleteThatFailsIsTriedAgain$"), property("manager", "^TestNothingNeededIsEverDeleted$"),
	}},
	{"p5", "a restore's snapshot can be dropped once a lease has ended", []layer{
		unit("manager", "^(TestRestorePins|TestRestoreWithStoreDown)$"),
	}},
	{"p6", "half of a restored collection shows", []layer{
		unit("manager", "^(TestRestoringIsNobodysBusiness|TestRestoreCanceledBetweenWrites)$"),
	}},
	{"p7a", "a snapshot is committed with an object that is not its own", []layer{
		unit("manager", "^TestForeignObjectIsNotOverwritten$"),
	}},
	{"p7b", "a write whose answer was lost fails, though it was made", []layer{
		server("store/object/s3", "^TestCreateWhoseAnswerIsLost$"),
	}},
	{"p8", "a copy counts as made that perhaps was not", []layer{
		server("store/object/s3", "^TestFaults$/200"),
	}},
	{"p9", "a snapshot is dropped that a restore reads", []layer{
		unit("manager", "^(TestRestorePins|TestDropOfPinnedIsRefused)$"),
	}},
	{"p10", "what was altered in the bucket is believed", []layer{
		unit("store/manifest", "^TestDigest"), unit("manager", "^TestCorruptSnapshotIsSaidToBe$"),
	}},
	{"p11", "an object is deleted that is younger than the grace period", []layer{
		unit("gc", "^TestSweepTakes$"),
	}},
	{"p12a", "a call that is repeated takes effect twice", []layer{
		unit("manager", "^TestCreateTokens$"),
	}},
	{"p12b", "a renewal counts as made that was another's", []layer{
		unit("manager", "^(TestRenewal|TestLateRenewal)"),
	}},
	{"p13", "a restore that failed leaves unfinished uploads", []layer{
		unit("manager", "^TestRollBackAbortsUploads$"),
	}},
}
