package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Errors that callers distinguish; each is wrapped with its subject.
var (
	ErrNeverExisted     = errors.New("no snapshot ever had this id")
	ErrExpiredOrDropped = errors.New("snapshot expired or was dropped")
	ErrNotCommitted     = errors.New("snapshot not committed")
	ErrCorrupt          = errors.New("snapshot corrupt")
	// ErrDigest means that an object of a snapshot does not match its digest. A
	// transfer error is possible, so a later read may succeed. It comes with ErrCorrupt.
	ErrDigest = errors.New("not as it was written")
)

// ReaderOptions configure a Reader.
type ReaderOptions struct {
	KV      meta.KV                 // required
	Catalog *catalog.Catalog        // required for the error of an id without a record
	Stores  map[string]object.Store // by alias
	// Exists is required. It reports whether a snapshot has a record. The cache removes the files of
	// snapshots without one.
	Exists func(id int64) bool
}

// Reader reads snapshots: their records, and the metadata and manifests of committed
// ones. It checks the digest of each object. A cache has the objects that were read last.
// A Reader is safe for concurrent use.
type Reader struct {
	o         ReaderOptions
	manifests manifestCache
}

// NewReader returns a Reader.
func NewReader(o ReaderOptions) *Reader { return &Reader{o: o} }

// Segment is a segment as a snapshot holds it.
type Segment struct {
	Ordinal int64
	segment.Segment
}

// Record returns the record of a snapshot by id, nil if there is none.
func (r *Reader) Record(ctx context.Context, id int64) (*Record, error) {
	kv, found, _, err := r.o.KV.Get(ctx, keys.Snapshot(id))
	if err != nil {
		return nil, fmt.Errorf("read snapshot %d: %w", id, err)
	}
	if !found {
		return nil, nil //nolint:nilnil // no record
	}
	return Decode(kv)
}

// Missing returns the error for an id without a record: ErrExpiredOrDropped if it was
// allocated, else ErrNeverExisted. name is the snapshot's in the error.
func (r *Reader) Missing(ctx context.Context, id int64, name string) error {
	_, ok, err := r.o.Catalog.Allocated(ctx, id)
	switch {
	case err != nil:
		return err
	case ok:
		return fmt.Errorf("%w: %s", ErrExpiredOrDropped, name)
	}
	return fmt.Errorf("%w: %s", ErrNeverExisted, name)
}

// Committed returns the record of a snapshot by id, or an error if it is not COMMITTED.
func (r *Reader) Committed(ctx context.Context, id int64) (*Record, error) {
	s, err := r.Record(ctx, id)
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, r.Missing(ctx, id, strconv.FormatInt(id, 10))
	}
	if err := s.CheckCommitted(); err != nil {
		return nil, err
	}
	return s, nil
}

// Metadata reads a snapshot's metadata and checks its digest against the record.
func (r *Reader) Metadata(ctx context.Context, s *Record) (*manifest.Metadata, error) {
	data, err := r.readCached(ctx, s, manifest.MetadataName, s.Metadata)
	if err != nil {
		return nil, err
	}
	md, err := manifest.DecodeMetadata(data)
	if errors.Is(err, manifest.ErrCorrupt) {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return md, err
}

// readObject reads one of a snapshot's own objects and checks its digest.
func (r *Reader) readObject(ctx context.Context, s *Record, name string, want manifest.Digest) ([]byte, error) {
	store, ok := r.o.Stores[s.Store]
	if !ok {
		return nil, fmt.Errorf("%w: the objects of snapshot %s are in %q, which is not configured here",
			object.ErrStoreNotFound, s, s.Store)
	}
	key := manifest.Dir(s.Collection, s.ID) + name
	data, err := object.ReadVerified(ctx, store, key, want.Length, func(data []byte) error {
		if err := want.Check(data); err != nil {
			return fmt.Errorf("%w: %s/%s: %w: %w", ErrCorrupt, s.Store, key, ErrDigest, err)
		}
		return nil
	})
	if errors.Is(err, object.ErrNotFound) {
		if now, readErr := r.Record(ctx, s.ID); readErr == nil && (now == nil || now.State != Committed) {
			return nil, fmt.Errorf("%w: %s", ErrExpiredOrDropped, s) // during this read
		}
		return nil, fmt.Errorf("%w: %s/%s is missing", ErrCorrupt, s.Store, key)
	}
	return data, err
}

// Segments calls fn with the segments of one manifest after the first skip ones.
// more is false if fn returned false.
func (r *Reader) Segments(
	ctx context.Context, s *Record, mf *manifest.ManifestFile, skip int64, fn func(*Segment) bool,
) (more bool, err error) {
	data, err := r.readCached(ctx, s, mf.File, mf.Digest)
	if err != nil {
		return false, err
	}
	f, err := manifest.Open(data)
	if err == nil {
		err = f.Skip(int(skip))
	}
	for n := mf.FirstOrdinal + skip; err == nil; n++ {
		seg, nextErr := f.Next()
		switch {
		case errors.Is(nextErr, io.EOF):
			return true, nil
		case nextErr != nil:
			err = nextErr
		case !fn(&Segment{Ordinal: n, Segment: *seg}):
			return false, nil
		}
	}
	if errors.Is(err, manifest.ErrCorrupt) {
		return false, fmt.Errorf("%w: %s: %w", ErrCorrupt, mf.File, err)
	}
	return false, err
}

// readCached is readObject with the cache.
func (r *Reader) readCached(ctx context.Context, s *Record, name string, want manifest.Digest) ([]byte, error) {
	key := manifest.Dir(s.Collection, s.ID) + name
	if data := r.manifests.get(key); data != nil {
		return data, nil
	}
	data, err := r.readObject(ctx, s, name, want)
	if err == nil {
		r.manifests.put(cachedFile{s.ID, key, data}, r.o.Exists)
	}
	return data, err
}
