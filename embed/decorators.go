package embed

import (
	"net/http"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Decorators wrap the stores of a server, to count, delay, fail or trace its
// operations. They are for programs of this module, since their types are internal.
// A nil field has no effect.
type Decorators struct {
	// KV wraps the metadata store. See [meta.Txn] for the name of a transaction.
	KV func(meta.KV) meta.KV
	// Store wraps each object store, below the check of its identity.
	Store func(object.Store) object.Store
	// Transport wraps the HTTP transport of each object store of type s3.
	Transport func(http.RoundTripper) http.RoundTripper
}
