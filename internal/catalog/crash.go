package catalog

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atChange           = crashpoint.New("catalog.change")
	atHold             = crashpoint.New("catalog.park")
	atAllocate         = crashpoint.New("catalog.allocate")
	atClaimAll         = crashpoint.New("catalog.claimall")
	atFinishPart       = crashpoint.New("collect.part")
	atFinishCollection = crashpoint.New("collect.collection")
)
