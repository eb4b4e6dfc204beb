package epoch

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atIntend  = crashpoint.New("epoch.intend")
	atCreate  = crashpoint.New("epoch.create")
	atDone    = crashpoint.New("epoch.done")
	atForget  = crashpoint.New("epoch.forget")
	atMark    = crashpoint.New("epoch.mark")
	atRecover = crashpoint.New("epoch.recover")
)
