package s3

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The requests that change something; see package crashpoint. Of writes in parts
// there is none: no manifest is that large in a test.
var (
	atPut      = crashpoint.New("bucket.put")
	atCopy     = crashpoint.New("bucket.copy")
	atBegin    = crashpoint.New("bucket.begin")
	atPart     = crashpoint.New("bucket.part")
	atComplete = crashpoint.New("bucket.complete")
	atAbort    = crashpoint.New("bucket.abort")
	atDelete   = crashpoint.New("bucket.delete")
)
