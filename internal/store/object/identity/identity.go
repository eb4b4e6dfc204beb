// Package identity verifies that an alias names the same object store in all replicas. Two
// replicas with different directories or buckets for one alias would commit snapshots that
// the other cannot read. Therefore each store has an object with a random id, the metadata
// store has the same id for the alias, and a replica does not start if they differ. The
// object also names the cluster: two clusters assign the same ids to different snapshots,
// so they must not share a bucket and prefix.
//
// One store with two aliases would give each object two names: a root could be inside
// another, and one file could count as two of a segment. An alias is therefore recorded only
// if no other alias in use has the id:
//
//	record  compares: the alias is absent; each other alias in use as read, with
//	        another id or absent
//	        puts: the alias with the store's id
//
//	two aliases of one store,           one transaction finds the other alias changed,
//	concurrently                        and the replica reads again
//	no reply                            a repeat finds the alias recorded, or records it
//	an alias that is no longer in use   is not compared: a store may get a new alias
//	both recorded by an older release   both stay
package identity

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Key is the object with a store's id. It is under snapshots/ because no root of a
// collection may be there.
const Key = "snapshots/identity.json"

// ErrOther means that an alias names another object store in this replica than in the
// cluster.
var ErrOther = errors.New("not the object store that the cluster knows")

// ErrTwice means that the store has another alias already.
var ErrTwice = errors.New("the object store has another alias already")

const (
	maxAttempts   = 16
	formatVersion = 1
	idBytes       = 16
	maxBytes      = 4 << 10 // far more than the object has
)

// content is the object, as JSON.
type content struct {
	FormatVersion int    `json:"format_version"`
	ID            string `json:"id"`
	Cluster       string `json:"cluster_id"`
}

// Check returns nil if alias names the store in the cluster with the metadata store kv and
// the id cluster. It records an unknown alias; if several replicas do so with different
// stores, one succeeds and the others get ErrOther. It returns ErrTwice if one of inUse, the
// other aliases of this replica, names the store.
func Check(
	ctx context.Context, kv meta.KV, store object.Store, alias, cluster string, rand io.Reader, inUse ...string,
) error {
	known, found, _, err := kv.Get(ctx, keys.Store(alias))
	if err != nil {
		return fmt.Errorf("read the identity of object store %s: %w", alias, err)
	}
	has, err := read(ctx, store)
	if found {
		return compare(alias, string(known.Value), has.ID, err)
	}
	if errors.Is(err, object.ErrNotFound) {
		has, err = create(ctx, store, cluster, rand)
	}
	switch {
	case err != nil:
		return fmt.Errorf("identity of object store %s: %w", alias, err)
	case has.Cluster != cluster:
		return fmt.Errorf("object store %s: %w: %s belongs to cluster %s, this is cluster %s; "+
			"configure a separate directory, bucket or prefix for each cluster",
			alias, ErrOther, Key, has.Cluster, cluster)
	}
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return err
		}
		conds, err := noOtherAlias(ctx, kv, alias, has.ID, inUse)
		if err != nil {
			return err
		}
		res, err := kv.Txn(ctx, meta.Txn{
			Name: "start.store",
			If:   append(conds, meta.Absent(keys.Store(alias))),
			Then: []meta.Op{meta.Put(keys.Store(alias), []byte(has.ID))},
			Else: []meta.Op{meta.Get(keys.Store(alias))},
		})
		if err != nil {
			return fmt.Errorf("record the identity of object store %s: %w", alias, err)
		}
		if res.Succeeded {
			return nil
		}
		if len(res.Ranges[0]) > 0 { // recorded by another replica
			return compare(alias, string(res.Ranges[0][0].Value), has.ID, nil)
		}
	}
	return fmt.Errorf("record the identity of object store %s: %w: too many concurrent changes of other aliases",
		alias, meta.ErrUnavailable)
}

// noOtherAlias returns the compares that none of inUse names the store with the id.
func noOtherAlias(ctx context.Context, kv meta.KV, alias, id string, inUse []string) ([]meta.Cond, error) {
	var conds []meta.Cond
	for _, other := range inUse {
		if other == alias {
			continue
		}
		got, found, _, err := kv.Get(ctx, keys.Store(other))
		switch {
		case err != nil:
			return nil, fmt.Errorf("read the identity of object store %s: %w", other, err)
		case !found:
			conds = append(conds, meta.Absent(keys.Store(other)))
		case string(got.Value) == id:
			return nil, fmt.Errorf("object store %s: %w: %s names the same store, so objects would have two names; "+
				"configure one of the two", alias, ErrTwice, other)
		default:
			conds = append(conds, meta.Unchanged(keys.Store(other), got.ModRevision))
		}
	}
	return conds, nil
}

// Known reports whether alias is recorded in kv. If it is, the error is nil only if alias
// names the store. It writes nothing.
func Known(ctx context.Context, kv meta.KV, store object.Store, alias string) (bool, error) {
	known, found, _, err := kv.Get(ctx, keys.Store(alias))
	if err != nil || !found {
		return false, err
	}
	has, err := read(ctx, store)
	return true, compare(alias, string(known.Value), has.ID, err)
}

// compare compares the recorded id with the result of read.
func compare(alias, want, has string, err error) error {
	const remedy = "all replicas must reach the same store under the same alias"
	switch {
	case errors.Is(err, object.ErrNotFound):
		return fmt.Errorf("object store %s: %w: it has no %s with id %s, so it is a wrong directory, bucket or prefix, "+
			"or was emptied; %s", alias, ErrOther, Key, want, remedy)
	case err != nil:
		return fmt.Errorf("identity of object store %s: %w", alias, err)
	case has != want:
		return fmt.Errorf("object store %s: %w: %s has id %s, the cluster has id %s, so it is a wrong directory, bucket "+
			"or prefix; %s", alias, ErrOther, Key, has, want, remedy)
	}
	return nil
}

// read reads the identity object.
func read(ctx context.Context, store object.Store) (c content, err error) {
	data, err := object.ReadAll(ctx, store, Key, maxBytes)
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("%s is damaged: %w", Key, err)
	}
	if c.FormatVersion != formatVersion {
		return c, fmt.Errorf("%s has format version %d, this release reads %d", Key, c.FormatVersion, formatVersion)
	}
	if id, err := hex.DecodeString(c.ID); err != nil || len(id) != idBytes {
		return c, fmt.Errorf("%s is damaged: no valid id", Key)
	}
	return c, nil
}

// create creates the identity object, and returns the existing one if another replica has
// created it.
func create(ctx context.Context, store object.Store, cluster string, rand io.Reader) (content, error) {
	id := make([]byte, idBytes)
	if _, err := io.ReadFull(rand, id); err != nil {
		return content{}, fmt.Errorf("make an id: %w", err)
	}
	c := content{FormatVersion: formatVersion, ID: hex.EncodeToString(id), Cluster: cluster}
	data, err := json.Marshal(c)
	if err != nil {
		return content{}, err
	}
	_, err = store.Create(ctx, Key, append(data, '\n'))
	if errors.Is(err, object.ErrExists) { // by another replica, or by a retry of this call
		return read(ctx, store)
	}
	return c, err
}
