package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Snapshots outlive their collection and are found by its name. A collection's name
// therefore means the existing collection with the name; if there is none, the collection
// that had the name in its newest snapshot. If several collections had it, the answer
// carries a note, and a drop requires an id. The target of a restore has no snapshots and
// often gets the name of a dropped collection: it counts as existing once published.

// maxNamed is the maximum number of ids or channels in a note or an error.
const maxNamed = 5

// Notes collects remarks on a successful answer, such as the resolution of an ambiguous
// name. It is safe for concurrent use.
type Notes struct {
	mu   sync.Mutex
	list []string
}

type notesKey struct{}

// WithNotes returns a context whose calls add their remarks to the Notes.
func WithNotes(ctx context.Context) (context.Context, *Notes) {
	n := &Notes{}
	return context.WithValue(ctx, notesKey{}, n), n
}

// List returns the remarks, each once.
func (n *Notes) List() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.list)
}

// addNote adds a remark to the Notes of ctx, if it has any.
func addNote(ctx context.Context, text string) {
	n, ok := ctx.Value(notesKey{}).(*Notes)
	if !ok {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !slices.Contains(n.list, text) {
		n.list = append(n.list, text)
	}
}

// formerCollection is a collection that had a name, with its newest snapshot of that
// time.
type formerCollection struct {
	collection, snapshot int64
}

// formerCollections returns the collections other than liveID that had the name of ref
// when a snapshot of them was taken, each with its newest such snapshot, newest first. A
// non-empty name restricts the search to snapshots of that name.
func (v *view) formerCollections(ref catalog.Ref, name string, liveID int64) []formerCollection {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var list []formerCollection
	for _, s := range v.ordered {
		if s.DB != ref.DB || s.CollectionName != ref.Name || s.Collection == liveID || s.State == snapshot.Deleting ||
			name != "" && s.Name != name {
			continue
		}
		if !slices.ContainsFunc(list, func(f formerCollection) bool { return f.collection == s.Collection }) {
			list = append(list, formerCollection{s.Collection, s.ID})
		}
	}
	return list
}

// ambiguousName describes the collections that had a name.
func ambiguousName(ref catalog.Ref, list []formerCollection) string {
	var ids []int64
	for _, f := range list[:min(len(list), maxNamed)] {
		ids = append(ids, f.collection)
	}
	return fmt.Sprintf("%d collections had the name %s, with ids %v, the newest first", len(list), ref, ids)
}

// ResolveCollection returns the id for a collection's name: that of the existing
// collection, else that of the collection that had the name in its newest snapshot. It
// returns ErrCollectionNotFound if there is neither.
func (m *Manager) ResolveCollection(ctx context.Context, ref catalog.Ref) (int64, error) {
	id, err := m.catalog.Resolve(ctx, ref)
	if err == nil && ref.ID == 0 {
		restoring, err := m.isRestoring(ctx, id)
		if err != nil || !restoring {
			return id, err
		}
	} else if !errors.Is(err, catalog.ErrCollectionNotFound) {
		return id, err
	}
	if err := m.view.sync(ctx); err != nil {
		return 0, fmt.Errorf("read snapshots of collection %s: %w", ref, err)
	}
	list := m.view.formerCollections(ref, "", 0)
	if len(list) == 0 {
		return id, err
	}
	if len(list) > 1 {
		addNote(ctx, ambiguousName(ref, list)+"; the answer is about the first")
	}
	return list[0].collection, nil
}

// isRestoring reports whether a collection is the unpublished target of a restore.
func (m *Manager) isRestoring(ctx context.Context, id int64) (bool, error) {
	col, err := m.catalog.Collection(ctx, catalog.Ref{ID: id})
	if errors.Is(err, catalog.ErrCollectionNotFound) { // removed since its name was read
		return false, nil
	}
	return col.State == catalog.Restoring, err
}

// resolve returns the id of ref, or ErrSnapshotNotFound. With strict it rejects an
// ambiguous name.
func (m *Manager) resolve(ctx context.Context, ref Ref, strict bool) (int64, error) {
	if ref.ID > 0 {
		return ref.ID, nil
	}
	if err := catalog.CheckName("snapshot.name", ref.Name); err != nil {
		return 0, err
	}
	if m.o.Cluster.NameScope != cluster.ScopeCollection {
		return m.lookupName(ctx, 0, ref)
	}
	if ref.Collection == (catalog.Ref{}) {
		return 0, &catalog.InvalidError{
			Field:   "snapshot.collection",
			Problem: "snapshot names are unique per collection here: name the collection, or use the snapshot's id",
		}
	}
	liveID, err := m.catalog.Resolve(ctx, ref.Collection)
	if err == nil {
		id, err := m.lookupName(ctx, liveID, ref)
		if !errors.Is(err, ErrSnapshotNotFound) || ref.Collection.ID > 0 {
			return id, err
		}
		restoring, err := m.isRestoring(ctx, liveID)
		if err != nil {
			return 0, err
		}
		if restoring {
			liveID = 0
		}
	} else if !errors.Is(err, catalog.ErrCollectionNotFound) {
		return 0, err
	}
	if syncErr := m.view.sync(ctx); syncErr != nil {
		return 0, fmt.Errorf("read snapshot %s: %w", ref, syncErr)
	}
	list := m.view.formerCollections(ref.Collection, ref.Name, liveID)
	switch {
	case len(list) == 0 && err != nil && len(m.view.formerCollections(ref.Collection, "", 0)) == 0:
		return 0, err
	case len(list) == 0:
		return 0, notFound(ref)
	case strict && liveID != 0:
		return 0, fmt.Errorf("%w: collection %s (%d) has no snapshot of this name, but collection %d, "+
			"which had the collection name before, has snapshot %d; use the snapshot's id",
			ErrSnapshotMismatch, ref.Collection, liveID, list[0].collection, list[0].snapshot)
	case strict && len(list) > 1:
		return 0, fmt.Errorf("%w: %s; use the snapshot's id", ErrSnapshotMismatch, ambiguousName(ref.Collection, list))
	case len(list) > 1:
		addNote(ctx, fmt.Sprintf("%s, and a snapshot %s; the answer is about that of the first",
			ambiguousName(ref.Collection, list), ref.Name))
	}
	return list[0].snapshot, nil
}

func notFound(ref Ref) error {
	return fmt.Errorf("%w: %q; see ListSnapshots for those there are", ErrSnapshotNotFound, ref.Name)
}

// lookupName returns the id of a snapshot's name within a scope.
func (m *Manager) lookupName(ctx context.Context, scope int64, ref Ref) (int64, error) {
	kv, found, _, err := m.kv.Get(ctx, keys.SnapshotName(scope, ref.Name))
	if err != nil {
		return 0, fmt.Errorf("read snapshot %s: %w", ref, err)
	}
	if !found {
		return 0, notFound(ref)
	}
	rec := &storagev1.Name{}
	if err := record.Decode(kv, rec); err != nil {
		return 0, err
	}
	return rec.GetId(), nil
}

// checkCollection returns an error unless the snapshot is of the collection of ref: the
// existing one, or one that had the name when the snapshot was taken.
func (m *Manager) checkCollection(ctx context.Context, s *snapshot.Record, ref Ref) error {
	if ref.Collection == (catalog.Ref{}) {
		return nil
	}
	nameMatches := ref.Collection.ID == 0 && s.DB == ref.Collection.DB && s.CollectionName == ref.Collection.Name
	collection, err := m.catalog.Resolve(ctx, ref.Collection)
	switch {
	case errors.Is(err, catalog.ErrCollectionNotFound) && nameMatches:
		return nil
	case err != nil:
		return err
	case collection == s.Collection:
		return nil
	case nameMatches && m.o.Cluster.NameScope == cluster.ScopeCollection:
		return nil // resolve found it by this name
	case nameMatches:
		if restoring, err := m.isRestoring(ctx, collection); err != nil || restoring {
			return err
		}
	}
	return fmt.Errorf("%w: %s is not of collection %s but of %s/%s (%d)", ErrSnapshotMismatch, ref, ref.Collection,
		s.DB, s.CollectionName, s.Collection)
}
