//go:build unix

package crashpoint

import (
	"bytes"
	"context"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
)

// leaseEnds names the steps that end a lease, by the name of the first transaction
// that put a key under it.
var leaseEnds = map[string]string{
	"create.begin": "create.endlease",
	"elect.claim":  "elect.resign",
}

// The classes of keys of objects.
const (
	classManifest = "manifest"
	classRefs     = "refs"
	classMetadata = "metadata"
	classIdentity = "identity"
	classEpoch    = "epoch"
	classHeld     = "held" // records of spilled units
	classETags    = "etags"
	classProbe    = "probe"
	classFile     = "file" // of segments and index builds
)

var ofSnapshot = regexp.MustCompile(`^snapshots/[0-9]+/[0-9]+/(manifest|refs|metadata)[^/]*$`)

// classOf returns the class of an object by its key.
func classOf(key string) string {
	if m := ofSnapshot.FindStringSubmatch(key); m != nil {
		return m[1]
	}
	if key == identity.Key {
		return classIdentity
	}
	for prefix, class := range map[string]string{
		epoch.Prefix: classEpoch, catalog.SpillPrefix: classHeld, catalog.RestorePrefix: classETags,
		probe.Dir + "/": classProbe,
	} {
		if strings.HasPrefix(key, prefix) {
			return class
		}
	}
	return classFile
}

// objectSteps names the steps of an object store, by operation and class of the key.
var objectSteps = map[object.Op]map[string]string{
	object.OpPut: {classHeld: "held.put"},
	object.OpCreate: {
		classManifest: "create.manifest", classRefs: "create.refs", classMetadata: "create.metadata",
		classIdentity: "start.identity", classEpoch: "epoch.create", classHeld: "held.put", classETags: "restore.pin",
	},
	object.OpCopy: {classFile: "restore.copy"},
	object.OpDelete: {
		classManifest: "drop.objects", classRefs: "drop.objects", classMetadata: "drop.objects",
		classEpoch: "epoch.forget", classHeld: "held.delete", classETags: "restore.pins", classFile: "file.delete",
	},
}

// requestSteps names the steps of a bucket, by method and by the parameter that
// distinguishes the request. No scenario writes an object in parts, so bucket.part is
// a part of a copy.
var requestSteps = map[[2]string]string{
	{http.MethodPost, "uploads"}:    "bucket.begin",
	{http.MethodPut, "uploadId"}:    "bucket.part",
	{http.MethodPost, "uploadId"}:   "bucket.complete",
	{http.MethodDelete, "uploadId"}: "bucket.abort",
	{http.MethodPost, "delete"}:     "bucket.delete",
	{http.MethodPut, ""}:            "bucket.put",
	{http.MethodPut, "copy"}:        "bucket.copy",
}

// Names returns the names of all steps but transactions, sorted.
func Names() []string {
	names := map[string]bool{}
	for _, name := range leaseEnds {
		names[name] = true
	}
	for _, byClass := range objectSteps {
		for _, name := range byClass {
			names[name] = true
		}
	}
	for _, name := range requestSteps {
		names[name] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// KV returns inner with its named transactions, and the ends of some leases, as
// steps.
func (p *Points) KV(inner meta.KV) meta.KV { return kv{inner, p} }

type kv struct {
	meta.KV

	p *Points
}

// Txn implements [meta.KV].
func (k kv) Txn(ctx context.Context, t meta.Txn) (res meta.TxnResult, err error) {
	for _, op := range slices.Concat(t.Then, t.Else) {
		k.p.leased(op.Lease, t.Name)
	}
	k.p.around(t.Name, func() { res, err = k.KV.Txn(ctx, t) })
	return res, err
}

// Revoke implements [meta.KV].
func (k kv) Revoke(ctx context.Context, id meta.LeaseID) (err error) {
	k.p.mu.Lock()
	step := leaseEnds[k.p.leases[id]]
	k.p.mu.Unlock()
	k.p.around(step, func() { err = k.KV.Revoke(ctx, id) })
	return err
}

// leased records that the transaction of a name puts a key under a lease.
func (p *Points) leased(id meta.LeaseID, name string) {
	if id == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, known := p.leases[id]; !known {
		p.leases[id] = name
	}
}

// Store returns inner with its writes, copies and deletions as steps.
func (p *Points) Store(inner object.Store) object.Store { return store{inner, p} }

type store struct {
	object.Store

	p *Points
}

// Put implements [object.Store].
func (s store) Put(ctx context.Context, key string, body []byte) (info object.Info, err error) {
	s.p.around(objectSteps[object.OpPut][classOf(key)], func() { info, err = s.Store.Put(ctx, key, body) })
	return info, err
}

// Create implements [object.Store].
func (s store) Create(ctx context.Context, key string, body []byte) (info object.Info, err error) {
	s.p.around(objectSteps[object.OpCreate][classOf(key)], func() { info, err = s.Store.Create(ctx, key, body) })
	return info, err
}

// Copy implements [object.Store].
func (s store) Copy(ctx context.Context, r object.CopyRequest) (info object.Info, err error) {
	s.p.around(objectSteps[object.OpCopy][classOf(r.To)], func() { info, err = s.Store.Copy(ctx, r) })
	return info, err
}

// Delete implements [object.Store]. The keys of one call are of one class.
func (s store) Delete(ctx context.Context, keys ...string) (err error) {
	step := ""
	if len(keys) > 0 {
		step = objectSteps[object.OpDelete][classOf(keys[0])]
	}
	s.p.around(step, func() { err = s.Store.Delete(ctx, keys...) })
	return err
}

// Transport returns inner with the requests that change a bucket as steps.
func (p *Points) Transport(inner http.RoundTripper) http.RoundTripper { return transport{inner, p} }

type transport struct {
	inner http.RoundTripper
	p     *Points
}

// RoundTrip implements [http.RoundTripper]. A step ends with the body of its answer.
func (t transport) RoundTrip(r *http.Request) (resp *http.Response, err error) {
	step := requestStep(r)
	t.p.around(step, func() {
		if resp, err = t.inner.RoundTrip(r); err != nil || step == "" { //nolint:bodyclose // the caller closes it
			return
		}
		body, readErr := io.ReadAll(resp.Body)
		rest := io.Reader(bytes.NewReader(body))
		if readErr != nil {
			rest = io.MultiReader(rest, failing{readErr})
		}
		resp.Body = withCloser{rest, resp.Body}
	})
	return resp, err
}

// requestStep returns the step of a request; empty: none.
func requestStep(r *http.Request) string {
	query := r.URL.Query()
	for _, param := range []string{"uploads", "uploadId", "delete"} {
		if query.Has(param) {
			return requestSteps[[2]string{r.Method, param}]
		}
	}
	if r.Header.Get("X-Amz-Copy-Source") != "" {
		return requestSteps[[2]string{r.Method, "copy"}]
	}
	return requestSteps[[2]string{r.Method, ""}]
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type withCloser struct {
	io.Reader
	io.Closer
}
