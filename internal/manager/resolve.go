package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Snapshots outlive their collection, and are looked for by its name. So a
// collection's name stands for the living collection that has it, and else for the
// one that had it when the newest of the snapshots that say so was taken. When
// there are several of these, a note goes with the answer, and nothing is dropped
// without an id. A collection that a restore makes has no snapshots, and is often given
// the name of the one that was dropped: it counts as living once it is published.

// maxNamed is how many ids a note or an error names.
const maxNamed = 5

// Notes collects remarks on an answer that is no error, such as how an ambiguous
// name was resolved.
type Notes struct {
	mu   sync.Mutex
	list []string
}

type notesKey struct{}

// WithNotes returns a context whose calls put their remarks into the Notes.
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

func note(ctx context.Context, text string) {
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

// former is a snapshot's record whose collection had a name.
type former struct {
	collection, snapshot int64
}

// former returns the collections that had a name when a snapshot of them was
// taken, other than living, each with its newest such snapshot, newest first. A
// snapshot's name restricts it to snapshots of that name.
func (v *view) former(ref catalog.Ref, snapshot string, living int64) []former {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var list []former
	for _, s := range v.ordered {
		if s.DB != ref.DB || s.CollectionName != ref.Name || s.Collection == living || s.State == Deleting ||
			snapshot != "" && s.Name != snapshot {
			continue
		}
		if !slices.ContainsFunc(list, func(f former) bool { return f.collection == s.Collection }) {
			list = append(list, former{s.Collection, s.ID})
		}
	}
	return list
}

// severalNamed says which collections had a name.
func severalNamed(ref catalog.Ref, list []former) string {
	var ids []int64
	for _, f := range list[:min(len(list), maxNamed)] {
		ids = append(ids, f.collection)
	}
	return fmt.Sprintf("%d collections had the name %s, with ids %v, the newest first", len(list), ref, ids)
}

// ResolveCollection returns the id that a collection's name stands for: that of the
// living collection, else the one that the newest snapshot of a collection of that
// name says. It is ErrCollectionNotFound when there is none.
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
	list := m.view.former(ref, "", 0)
	if len(list) == 0 {
		return id, err
	}
	if len(list) > 1 {
		note(ctx, severalNamed(ref, list)+"; the answer is about the first")
	}
	return list[0].collection, nil
}

// isRestoring says whether a restore makes the collection that has a name.
func (m *Manager) isRestoring(ctx context.Context, id int64) (bool, error) {
	col, err := m.catalog.Collection(ctx, catalog.Ref{ID: id})
	if errors.Is(err, catalog.ErrCollectionNotFound) { // since its name was read
		return false, nil
	}
	return col.State == catalog.Restoring, err
}

// resolve returns the id that ref stands for, ErrSnapshotNotFound if none. With
// certain it refuses a name that may stand for another snapshot than is meant.
func (m *Manager) resolve(ctx context.Context, ref Ref, certain bool) (int64, error) {
	if ref.ID > 0 {
		return ref.ID, nil
	}
	if err := catalog.CheckName("snapshot.name", ref.Name); err != nil {
		return 0, err
	}
	if m.o.Cluster.NameScope != cluster.ScopeCollection {
		return m.named(ctx, 0, ref)
	}
	if ref.Collection == (catalog.Ref{}) {
		return 0, &catalog.InvalidError{
			Field:   "snapshot.collection",
			Problem: "snapshot names are unique per collection here: say which collection, or give the snapshot's id",
		}
	}
	living, err := m.catalog.Resolve(ctx, ref.Collection)
	if err == nil {
		id, err := m.named(ctx, living, ref)
		if !errors.Is(err, ErrSnapshotNotFound) || ref.Collection.ID > 0 {
			return id, err
		}
		restoring, err := m.isRestoring(ctx, living)
		if err != nil {
			return 0, err
		}
		if restoring {
			living = 0
		}
	} else if !errors.Is(err, catalog.ErrCollectionNotFound) {
		return 0, err
	}
	if syncErr := m.view.sync(ctx); syncErr != nil {
		return 0, fmt.Errorf("read snapshot %s: %w", ref, syncErr)
	}
	list := m.view.former(ref.Collection, ref.Name, living)
	switch {
	case len(list) == 0 && err != nil && len(m.view.former(ref.Collection, "", 0)) == 0:
		return 0, err
	case len(list) == 0:
		return 0, notFound(ref)
	case certain && living != 0:
		return 0, fmt.Errorf("%w: collection %s (%d) has none of the name; snapshot %d of collection %d has, which had that name before; "+
			"give the snapshot's id", ErrSnapshotMismatch, ref.Collection, living, list[0].snapshot, list[0].collection)
	case certain && len(list) > 1:
		return 0, fmt.Errorf("%w: %s; give the snapshot's id", ErrSnapshotMismatch, severalNamed(ref.Collection, list))
	case len(list) > 1:
		note(ctx, severalNamed(ref.Collection, list)+fmt.Sprintf(", and a snapshot %s; the answer is about that of the first", ref.Name))
	}
	return list[0].snapshot, nil
}

func notFound(ref Ref) error {
	return fmt.Errorf("%w: %q; see ListSnapshots for those there are", ErrSnapshotNotFound, ref.Name)
}

// named returns the id that a snapshot's name stands for within a scope.
func (m *Manager) named(ctx context.Context, scope int64, ref Ref) (int64, error) {
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

// checkCollection holds a snapshot against the collection that ref names: it is of
// the living one, or had the name when it was taken.
func (m *Manager) checkCollection(ctx context.Context, s *Snapshot, ref Ref) error {
	if ref.Collection == (catalog.Ref{}) {
		return nil
	}
	named := ref.Collection.ID == 0 && s.DB == ref.Collection.DB && s.CollectionName == ref.Collection.Name
	collection, err := m.catalog.Resolve(ctx, ref.Collection)
	switch {
	case errors.Is(err, catalog.ErrCollectionNotFound) && named:
		return nil
	case err != nil:
		return err
	case collection == s.Collection:
		return nil
	case named && m.o.Cluster.NameScope == cluster.ScopeCollection:
		return nil // as resolve has found it
	case named:
		if restoring, err := m.isRestoring(ctx, collection); err != nil || restoring {
			return err
		}
	}
	return fmt.Errorf("%w: %s is not of collection %s but of %s/%s (%d)", ErrSnapshotMismatch, ref, ref.Collection,
		s.DB, s.CollectionName, s.Collection)
}
