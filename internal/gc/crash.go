package gc

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atGrant       = crashpoint.New("reclaim.grant")
	atDeleteHeld  = crashpoint.New("reclaim.held")
	atDelete      = crashpoint.New("reclaim.delete")
	atRemoveTombs = crashpoint.New("reclaim.tombs")
	atConfirm     = crashpoint.New("reclaim.confirm")

	atNote    = crashpoint.New("collect.note")
	atParkPut = crashpoint.New("park.put")
	atPark    = crashpoint.New("park.txn")
	atSweep   = crashpoint.New("sweep.delete")
)
