package copyjob

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atBegin    = crashpoint.New("restore.begin")
	atPrepare  = crashpoint.New("restore.prepare")
	atPrepared = crashpoint.New("restore.prepared")
	atWorker   = crashpoint.New("restore.worker")
	atAssign   = crashpoint.New("restore.assign")
	atPin      = crashpoint.New("restore.pin")
	atCopy     = crashpoint.New("restore.copy")
	atRegister = crashpoint.New("restore.register")
	atDone     = crashpoint.New("restore.done")
	atGiveBack = crashpoint.New("restore.giveback")
	atPublish  = crashpoint.New("restore.publish")

	atCancel        = crashpoint.New("restore.cancel")
	atGiveUp        = crashpoint.New("restore.giveup")
	atRemoveObjects = crashpoint.New("restore.objects")
	atRemovePins    = crashpoint.New("restore.pins")
	atRemoveContent = crashpoint.New("restore.content")
	atEnd           = crashpoint.New("restore.end")
	atRemoveLate    = crashpoint.New("restore.late")
	atForget        = crashpoint.New("restore.forget")
)
