// Package cluster manages the record of a cluster, which is written at its first start and
// never changes: the id of the cluster, the scope of snapshot names, and the key that authenticates
// page and resume tokens.
package cluster

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// NameScope is the scope in which snapshot names are unique. Stored: append only.
type NameScope int

// The name scopes.
const (
	ScopeCluster    NameScope = iota + 1 // in the cluster, the default
	ScopeCollection                      // per collection
)

func (s NameScope) String() string {
	if s == ScopeCollection {
		return "collection"
	}
	return "cluster"
}

// ErrNameScope means that the cluster was started with another name scope.
var ErrNameScope = errors.New("name scope cannot be changed")

// Cluster is the data that all replicas share.
type Cluster struct {
	ID        string
	NameScope NameScope
	TokenKey  []byte // authenticates page and resume tokens; never shown
}

// Options are the arguments of Open.
type Options struct {
	NameScope NameScope // default ScopeCluster
	Release   string    // of this program
	Now       func() time.Time
	Rand      io.Reader
}

// Open reads the cluster's record, and creates it at the first start. One of several
// concurrent replicas creates it, and all return the same. Another name scope than the
// recorded one is an ErrNameScope.
func Open(ctx context.Context, kv meta.KV, o Options) (Cluster, error) {
	if o.NameScope == 0 {
		o.NameScope = ScopeCluster
	}
	secret := make([]byte, 48)
	if _, err := io.ReadFull(o.Rand, secret); err != nil {
		return Cluster{}, fmt.Errorf("make a cluster id: %w", err)
	}
	fresh := &storagev1.Cluster{
		Format:        record.Format,
		ClusterId:     hex.EncodeToString(secret[:16]),
		NameScope:     uint32(o.NameScope),
		CreateTime:    o.Now().UnixNano(),
		OldestRelease: o.Release,
		TokenKey:      secret[16:],
	}
	// Read first: a full store refuses the transaction.
	have, found, _, err := kv.Get(ctx, keys.Format)
	if err != nil {
		return Cluster{}, fmt.Errorf("open cluster: %w", err)
	}
	if !found {
		res, err := kv.Txn(ctx, meta.Txn{
			Name: "start.cluster",
			If:   []meta.Cond{meta.Absent(keys.Format)},
			Then: []meta.Op{meta.Put(keys.Format, record.Encode(fresh))},
			Else: []meta.Op{meta.Get(keys.Format)},
		})
		if err != nil {
			return Cluster{}, fmt.Errorf("open cluster: %w", err)
		}
		if !res.Succeeded {
			have, found = res.Ranges[0][0], true
		}
	}
	rec := fresh
	if found {
		rec = &storagev1.Cluster{}
		if err := record.Decode(have, rec); err != nil {
			return Cluster{}, fmt.Errorf("open cluster: %w", err)
		}
	}
	c := Cluster{ID: rec.GetClusterId(), NameScope: NameScope(rec.GetNameScope()), TokenKey: rec.GetTokenKey()}
	if c.NameScope != o.NameScope {
		return Cluster{}, fmt.Errorf("%w: cluster %s was started with name_scope %q, the configuration has %q: set it to %q",
			ErrNameScope, c.ID, c.NameScope, o.NameScope, c.NameScope)
	}
	return c, nil
}
