package manager

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// How a snapshot is written.
const (
	chunkSegments   = 2500    // records per manifest
	chunkBytes      = 8 << 20 // of records per manifest, if reached first
	chunksInFlight  = 2       // manifests written concurrently
	advanceSegments = 64      // between two reports of progress
	captureAttempts = 3       // when the revision is compacted during the read
	putAttempts     = 5       // of one object, not counting calls without an answer
	verifyInFlight  = 16      // files checked concurrently, for each manifest
	maxStraddling   = 10      // segments named by an error
)

// captureAndWrite reads the collection at one revision and writes the snapshot's
// objects, the metadata last. It returns the record for commit.
func (m *Manager) captureAndWrite(ctx context.Context, c *creation, lease *createLease) (*snapshot.Record, error) {
	used := 0 // manifests begun so far: a key is not used twice
	for compacted := 0; ; {
		next, written, err := m.capture(ctx, c, lease, used)
		used += written
		if !errors.Is(err, meta.ErrCompacted) {
			return next, err
		}
		if compacted++; compacted == captureAttempts {
			return nil, fmt.Errorf("%w in each of %d captures; compact less often, or try again", ErrCatalogCompacted, compacted)
		}
	}
}

// capture performs one capture, with manifests numbered from first. begun is the
// number of manifests that it began.
func (m *Manager) capture(
	ctx context.Context, c *creation, lease *createLease, first int,
) (next *snapshot.Record, begun int, err error) {
	var view catalog.View
	err = lease.persist(ctx, func() (err error) {
		view, err = m.catalog.At(ctx, c.snap.Collection, c.revision)
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	if view.Collection.State != catalog.Active {
		return nil, 0, view.Collection.CheckActive()
	}
	w := &snapshotWriter{
		m: m, spec: &c.spec, snap: c.snap, view: &view, filter: newCaptureFilter(&view), lease: lease, first: first,
		chunkCap: int(min(c.segments, chunkSegments)), memory: c.memory,
	}
	next, err = w.run(ctx)
	return next, len(w.chunks), err
}

// snapshotWriter writes one capture. One goroutine reads the records of segments into
// chunks. One goroutine per chunk writes its manifest: it decodes, captures and encodes
// one segment after another, so that memory is bounded by records and manifests.
type snapshotWriter struct {
	m      *Manager
	spec   *CreateSpec
	snap   *snapshot.Record
	view   *catalog.View
	filter *captureFilter
	lease  *createLease

	first    int // number of the first chunk
	chunkCap int // initial capacity of a chunk, in records
	memory   *reservation
	chunks   []*chunk

	// Sums over the chunks.
	totals       segment.Totals
	straddling   []int64 // the first maxStraddling
	lacking      []int64 // the first maxStraddling
	lackingTotal int
	refsFile     manifest.RefsFile
	refs         *manifest.Refs // in that file
}

// chunk is a run of segments in id order, written as one manifest.
type chunk struct {
	number  int // of the manifest
	records []meta.KeyValue
	memory  chunkMemory // of the records, then of the manifest

	// The result. The chunk's goroutine sets it and closes encoded, unless it fails.
	totals       segment.Totals
	straddling   []int64 // the first maxStraddling
	lacking      []int64 // the first maxStraddling
	lackingTotal int
	refs         manifest.Refs
	digest       manifest.Digest
	encoded      chan struct{}
}

// add counts a captured segment and its references.
func (c *chunk) add(col *catalog.Collection, got *capturedSegment) {
	c.totals.Add(&got.Segment)
	addRefs(&c.refs, col, &got.Segment)
	if got.straddles {
		if c.totals.Straddling++; len(c.straddling) < maxStraddling {
			c.straddling = append(c.straddling, got.ID)
		}
	}
}

// run writes all objects and returns the record for commit.
func (w *snapshotWriter) run(ctx context.Context) (*snapshot.Record, error) {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(1 + chunksInFlight)
	group.Go(func() error {
		// The references have one key. They are written only after a complete read,
		// because an incomplete capture starts again.
		if err := w.readAll(groupCtx, group); err != nil {
			return err
		}
		return w.writeRefs(groupCtx)
	})
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if w.spec.RequireExact && w.totals.Straddling > 0 {
		return nil, fmt.Errorf("%w: %d of them, the first are %v; flush them, or do without require_exact",
			ErrNotExact, w.totals.Straddling, w.straddling)
	}
	return w.finish(ctx)
}

// readAll reads the records and starts to write each chunk in group once it is full.
// It blocks while chunksInFlight chunks are being written.
func (w *snapshotWriter) readAll(ctx context.Context, group *errgroup.Group) error {
	var c *chunk // being read
	size := 0
	flush := func() {
		full := c
		w.chunks = append(w.chunks, full)
		c, size = nil, 0
		group.Go(func() error {
			defer full.memory.end()
			return w.write(ctx, full)
		})
	}
	defer func() {
		if c != nil { // the read failed
			c.memory.end()
		}
	}()
	last := "" // key of the last record read
	err := w.lease.persist(ctx, func() error {
		_, err := w.m.catalog.ScanRecords(ctx, w.snap.Collection, w.view.Revision, last, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				if c == nil {
					c = &chunk{
						number: w.first + len(w.chunks), records: make([]meta.KeyValue, 0, w.chunkCap),
						memory: chunkMemory{reservation: w.memory}, encoded: make(chan struct{}),
					}
				}
				if err := c.memory.add(ctx, recordMemory(kv), w.lease.advance); err != nil {
					return err
				}
				c.records = append(c.records, kv)
				if size += len(kv.Value); len(c.records) == chunkSegments || size >= chunkBytes {
					flush()
				}
			}
			last = batch[len(batch)-1].Key
			return w.lease.advance(ctx)
		})
		return err
	})
	if err == nil {
		w.memory.allRead()
	}
	if err == nil && c != nil {
		flush()
	}
	return err
}

// write encodes a chunk and writes its manifest, unless no segment is captured.
func (w *snapshotWriter) write(ctx context.Context, c *chunk) error {
	data, err := w.encodeVerified(ctx, c)
	if err != nil {
		return err
	}
	c.digest = manifest.Sum(data)
	c.memory.shrink(int64(len(data)))
	close(c.encoded)
	if c.totals.Segments == 0 {
		return nil
	}
	return w.m.putOnce(ctx, manifest.ManifestKey(w.snap.Collection, w.snap.ID, c.number), data, w.lease)
}

// encodeVerified encodes a chunk, and concurrently checks its files if the create
// asks for verification.
func (w *snapshotWriter) encodeVerified(ctx context.Context, c *chunk) ([]byte, error) {
	if !w.spec.Verify {
		return w.encode(ctx, c, func(*segment.Segment) {})
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(verifyInFlight)
	data, err := w.encode(ctx, c, func(s *segment.Segment) {
		w.m.verify(ctx, group, w.view.Collection.Roots, s, w.lease)
	})
	if missing := group.Wait(); missing != nil { // the cause if encode was canceled
		return nil, missing
	}
	return data, err
}

// encode captures the segments of a chunk, calls visit with each captured one, and
// returns the manifest.
func (w *snapshotWriter) encode(ctx context.Context, c *chunk, visit func(*segment.Segment)) ([]byte, error) {
	end, err := w.m.memory.decode(ctx, c.records, w.lease.advance)
	if err != nil {
		return nil, err
	}
	defer end()
	out := manifest.NewWriter()
	defer out.Close()
	var decoder catalog.Decoder
	for i, kv := range c.records {
		if i%advanceSegments == 0 {
			if err := w.lease.advance(ctx); err != nil {
				return nil, err
			}
		}
		c.records[i] = meta.KeyValue{} // lets the record be collected
		s, err := decoder.Decode(w.snap.Collection, kv)
		if err != nil {
			return nil, err
		}
		got, err := w.filter.capture(s)
		if err != nil {
			return nil, err
		}
		if got.lacksFiles {
			if c.lackingTotal++; len(c.lacking) < maxStraddling {
				c.lacking = append(c.lacking, s.ID)
			}
		}
		if !got.included {
			continue
		}
		visit(&got.Segment)
		c.add(&w.view.Collection, &got)
		if err := out.Add(&got.Segment); err != nil {
			return nil, err
		}
	}
	c.records = nil
	return out.Finish(), nil
}

// writeRefs waits for all chunks to be encoded, sums their results, and writes the
// references.
func (w *snapshotWriter) writeRefs(ctx context.Context) error {
	refs := &manifest.Refs{}
	for _, c := range w.chunks {
		select {
		case <-c.encoded:
		case <-ctx.Done(): // for example, a chunk failed
			return ctx.Err()
		}
		w.totals.Segments += c.totals.Segments
		w.totals.Rows += c.totals.Rows
		w.totals.Files += c.totals.Files
		w.totals.Bytes += c.totals.Bytes
		w.totals.Builds += c.totals.Builds
		w.totals.Straddling += c.totals.Straddling
		w.straddling = append(w.straddling, c.straddling[:min(len(c.straddling), maxStraddling-len(w.straddling))]...)
		w.lackingTotal += c.lackingTotal
		w.lacking = append(w.lacking, c.lacking[:min(len(c.lacking), maxStraddling-len(w.lacking))]...)
		refs.Segments = append(refs.Segments, c.refs.Segments...)
		refs.Builds = append(refs.Builds, c.refs.Builds...)
		refs.Files = append(refs.Files, c.refs.Files...)
		c.refs = manifest.Refs{}
	}
	if w.lackingTotal > 0 {
		w.m.log.Warn("snapshot omits segments that are FLUSHED with rows but have no file, which an earlier release "+
			"accepted; add their files with UpdateSegments, or drop them", zap.Int64("snapshot", w.snap.ID),
			zap.Int("segments", w.lackingTotal), zap.Int64s("first", w.lacking))
	}
	sortRefs(refs)
	data, err := manifest.EncodeRefs(refs)
	if err != nil {
		return err
	}
	w.refsFile = manifest.RefsFile{
		File: manifest.RefsName, Digest: manifest.Sum(data),
		Segments: int64(len(refs.Segments)), Builds: int64(len(refs.Builds)), Files: int64(len(refs.Files)),
	}
	w.refs = refs
	return w.m.putOnce(ctx, manifest.RefsKey(w.snap.Collection, w.snap.ID), data, w.lease)
}

// finish writes the metadata and returns the record for commit.
func (w *snapshotWriter) finish(ctx context.Context) (*snapshot.Record, error) {
	next := w.snap.WithState(snapshot.Committed, "")
	next.CatalogRevision, next.Totals, next.BeginRevision = w.view.Revision, w.totals, w.snap.Revision
	next.DB, next.CollectionName = w.view.Collection.DB, w.view.Collection.Name
	md := describe(next, w.view, w.m.o.Cluster.ID, w.m.o.Release)
	for _, p := range md.Partitions {
		next.Partitions = append(next.Partitions, p.ID)
	}
	for _, ch := range md.Channels {
		next.Cuts = append(next.Cuts, snapshot.Cut{Shard: ch.Shard, Channel: ch.Name, Timestamp: ch.Cut})
	}
	md.Totals = manifest.Totals(w.totals)
	var ordinal, build int64
	for _, c := range w.chunks {
		if c.totals.Segments == 0 {
			continue
		}
		md.Manifests = append(md.Manifests, manifest.ManifestFile{
			File: manifest.ManifestName(c.number), Digest: c.digest, FirstOrdinal: ordinal, FirstBuild: build,
			Segments: c.totals.Segments, Rows: c.totals.Rows, Builds: c.totals.Builds, Files: c.totals.Files,
			Bytes: c.totals.Bytes,
		})
		ordinal, build = ordinal+c.totals.Segments, build+c.totals.Builds
		next.ManifestBytes += c.digest.Length
	}
	md.Refs = w.refsFile
	data, err := manifest.EncodeMetadata(md)
	if err != nil {
		return nil, err
	}
	if err := w.m.putOnce(ctx, manifest.MetadataKey(w.snap.Collection, w.snap.ID), data, w.lease); err != nil {
		return nil, err
	}
	next.Metadata, next.References = manifest.Sum(data), w.refsFile
	next.ManifestBytes += w.refsFile.Length + int64(len(data))
	w.m.gc.Prime(next.ID, next.Metadata, w.refs)
	return next, nil
}

// verify starts a check of every file of the segment in group. It blocks while group
// is at its limit, and does not retain s.
func (m *Manager) verify(
	ctx context.Context, group *errgroup.Group, roots []catalog.Root, s *segment.Segment, lease *createLease,
) {
	id := s.ID
	for f := range s.AllFiles() {
		file := *f
		group.Go(func() error {
			err := lease.persist(ctx, func() error {
				return retryRefusals(ctx, func() error { return m.verifyFile(ctx, roots[file.Root], &file, id) })
			})
			if err != nil {
				return err
			}
			return lease.advance(ctx)
		})
	}
}

// retryRefusals calls do up to putAttempts times while the store refuses it for a
// passing reason: one refused request does not end a create.
func retryRefusals(ctx context.Context, do func() error) (err error) {
	for attempt := range putAttempts {
		if over := meta.Pause(ctx, attempt*attempt*10); over != nil {
			return cmp.Or(err, over)
		}
		if err = do(); !object.IsPassing(err) {
			return err
		}
	}
	return err
}

// verifyFile checks that a file exists in its store as recorded.
func (m *Manager) verifyFile(ctx context.Context, root catalog.Root, f *segment.File, id int64) error {
	store, ok := m.o.Stores[root.Store]
	if !ok {
		return fmt.Errorf("%w: object store %q is not configured", ErrFileMissing, root.Store)
	}
	info, err := store.Head(ctx, root.Prefix+f.Path)
	switch {
	case errors.Is(err, object.ErrNotFound):
		return fmt.Errorf("%w: %s/%s of segment %d is not there", ErrFileMissing, root.Store, root.Prefix+f.Path, id)
	case err != nil:
		return err
	}
	if likeness, reason := compareFile(f, info); likeness.Refused() {
		return fmt.Errorf("%w: %s/%s of segment %d: %s", ErrFileMissing, root.Store, root.Prefix+f.Path, id, reason)
	}
	return nil
}

// putOnce creates one of the snapshot's own objects. After a call without an answer,
// or when the key exists, it reads the object: equal bytes are an earlier attempt's.
func (m *Manager) putOnce(ctx context.Context, key string, data []byte, lease *createLease) error {
	err := lease.persist(ctx, func() error {
		var last error
		for attempt := range putAttempts {
			if err := meta.Pause(ctx, attempt*attempt*10); err != nil {
				return cmp.Or(last, err)
			}
			_, err := m.store.Create(ctx, key, data)
			if err == nil {
				return nil
			}
			last = err
			there, err := object.ReadAll(ctx, m.store, key, int64(len(data)))
			switch {
			case errors.Is(err, object.ErrNotFound) && errors.Is(last, object.ErrInvalidKey):
				return last
			case errors.Is(err, object.ErrUnavailable): // the content of the key is unknown
				last = err
			case err != nil:
			case bytes.Equal(there, data):
				return nil
			default: // other content, or an altered read
				last = fmt.Errorf("%w with other content; snapshotd's prefix must be its own", object.ErrExists)
			}
		}
		return last
	})
	if errors.Is(err, object.ErrExists) && m.o.Epoch != nil && m.provesReusedID(ctx, key, data, lease) {
		m.catalog.ForgetStock(ctx)
		err = m.o.Epoch.Alarm(ctx, key)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	return lease.advance(ctx)
}

// maxProofBytes bounds the read of an object that occupies a key of a new snapshot.
const maxProofBytes = 4 << 20

// provesReusedID reports whether the object under a key of a new snapshot proves that
// the snapshot's id was allocated before: it is not data, two reads agree, and
// snapshotd wrote it as an object of that key. The alarm that follows stops the whole
// cluster. An altered read or an object of another program is therefore no proof; it
// fails this create only.
func (m *Manager) provesReusedID(ctx context.Context, key string, data []byte, lease *createLease) bool {
	var reads [2][]byte
	for i := range reads {
		err := lease.persist(ctx, func() (err error) {
			reads[i], err = object.ReadAll(ctx, m.store, key, maxProofBytes)
			return err
		})
		if err != nil {
			return false
		}
	}
	there := reads[0]
	return bytes.Equal(there, reads[1]) && !bytes.HasPrefix(data, there) && manifest.WrittenAs(key, there)
}
