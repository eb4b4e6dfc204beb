package cluster

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The step that a crash is tried at.
var atOpen = crashpoint.New("start.cluster")
