package manager

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atBegin    = crashpoint.New("create.begin")
	atManifest = crashpoint.New("create.manifest")
	atRefs     = crashpoint.New("create.refs")
	atMetadata = crashpoint.New("create.metadata")
	atCommit   = crashpoint.New("create.commit")
	atGiveUp   = crashpoint.New("create.giveup")
	atEndLease = crashpoint.New("create.endlease")
	atReap     = crashpoint.New("create.reap")

	atDrop          = crashpoint.New("drop.txn")
	atExpire        = crashpoint.New("drop.expire")
	atRemoveObjects = crashpoint.New("drop.objects")
	atRemoveRecord  = crashpoint.New("drop.record")

	atAdmit = crashpoint.New("restore.admit")

	atPin   = crashpoint.New("pin.create")
	atRenew = crashpoint.New("pin.renew")
	atUnpin = crashpoint.New("pin.remove")
)
