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
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// How a snapshot is written.
const (
	chunkSegments   = 2500    // records that make one manifest
	chunkBytes      = 8 << 20 // of records that do, if these are fewer
	chunksInFlight  = 2       // manifests being written at once
	advanceSegments = 64      // after which a create has come a step further
	captureAttempts = 3       // when the revision is compacted in mid-read
	putAttempts     = 5       // of one object, of those that the store answers
	verifyInFlight  = 16      // files looked at, at once, for each manifest
	maxStraddling   = 10      // segments that an error names
)

// captureAndWrite reads the collection at one revision and writes what it says,
// the metadata last. It returns the record as commit will write it.
func (m *Manager) captureAndWrite(ctx context.Context, c *creation, lease *createLease) (*Snapshot, error) {
	used := 0 // manifests that were begun: a key is not used twice
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

// capture is one capture, whose manifests are numbered from first on. It also
// returns how many it began.
func (m *Manager) capture(ctx context.Context, c *creation, lease *createLease, first int) (next *Snapshot, begun int, err error) {
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
		m: m, spec: &c.spec, snap: c.snap, view: &view, cutter: newCutter(&view), lease: lease, first: first,
		room: int(min(c.segments, chunkSegments)), memory: c.memory,
	}
	next, err = w.run(ctx)
	return next, len(w.chunks), err
}

// snapshotWriter writes one capture. One goroutine reads the records of segments
// and deals them out in chunks; one for each chunk makes a manifest of it. That
// decodes, captures and encodes one segment after another, so that no more than
// the records and the manifests are ever held.
type snapshotWriter struct {
	m      *Manager
	spec   *CreateSpec
	snap   *Snapshot
	view   *catalog.View
	cutter *cutter
	lease  *createLease

	first  int // number of the first chunk
	room   int // records to make room for in a chunk
	memory *reservation
	chunks []*chunk

	// What the chunks come to.
	totals     segment.Totals
	straddling []int64 // the first few
	lacking    []int64 // likewise
	lackingAll int     // how many there are
	refsFile   manifest.RefsFile
	refs       *manifest.Refs // in that file
}

// chunk is some segments, in the order of their ids.
type chunk struct {
	number  int // of the manifest
	records []meta.KeyValue
	memory  charge // of the records, then of the manifest

	// What is captured of them. Its goroutine sets it before it closes encoded,
	// which it does unless it fails.
	totals     segment.Totals
	straddling []int64 // the first few
	lacking    []int64 // likewise
	lackingAll int     // how many there are
	refs       manifest.Refs
	digest     manifest.Digest
	encoded    chan struct{}
}

// add counts what is captured of a segment.
func (c *chunk) add(col *catalog.Collection, got *captured) {
	c.totals.Add(&got.Segment)
	addRefs(&c.refs, col, &got.Segment)
	if got.straddles {
		if c.totals.Straddling++; len(c.straddling) < maxStraddling {
			c.straddling = append(c.straddling, got.ID)
		}
	}
}

func (w *snapshotWriter) run(ctx context.Context) (*Snapshot, error) {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(1 + chunksInFlight)
	group.Go(func() error {
		// When not all is read the capture starts over, and needs the key of the
		// references.
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

// readAll reads the records, and has each chunk of them written once it is full.
// It waits while chunksInFlight are being written.
func (w *snapshotWriter) readAll(ctx context.Context, group *errgroup.Group) error {
	var c *chunk // that is read
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
		if c != nil { // not all is read
			c.memory.end()
		}
	}()
	last := "" // key of the record that was read last
	err := w.lease.persist(ctx, func() error {
		_, err := w.m.catalog.ScanRecords(ctx, w.snap.Collection, w.view.Revision, last, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				if c == nil {
					c = &chunk{
						number: w.first + len(w.chunks), records: make([]meta.KeyValue, 0, w.room), memory: charge{of: w.memory},
						encoded: make(chan struct{}),
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

// write makes and writes the manifest of a chunk, unless nothing is captured of
// it.
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

// encodeVerified is encode, and has the files looked at meanwhile if that is
// wanted.
func (w *snapshotWriter) encodeVerified(ctx context.Context, c *chunk) ([]byte, error) {
	if !w.spec.Verify {
		return w.encode(ctx, c, func(*segment.Segment) {})
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(verifyInFlight)
	data, err := w.encode(ctx, c, func(s *segment.Segment) {
		w.m.verify(ctx, group, w.view.Collection.Roots, s, w.lease)
	})
	if missing := group.Wait(); missing != nil { // which ended encode
		return nil, missing
	}
	return data, err
}

// encode captures the segments of a chunk, shows each to look, and returns the
// manifest.
func (w *snapshotWriter) encode(ctx context.Context, c *chunk, look func(*segment.Segment)) ([]byte, error) {
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
		c.records[i] = meta.KeyValue{} // so that its memory can be used again
		s, err := decoder.Decode(w.snap.Collection, kv)
		if err != nil {
			return nil, err
		}
		got, err := w.cutter.capture(s)
		if err != nil {
			return nil, err
		}
		if got.lacking {
			if c.lackingAll++; len(c.lacking) < maxStraddling {
				c.lacking = append(c.lacking, s.ID)
			}
		}
		if !got.in {
			continue
		}
		look(&got.Segment)
		c.add(&w.view.Collection, &got)
		if err := out.Add(&got.Segment); err != nil {
			return nil, err
		}
	}
	c.records = nil
	return out.Finish(), nil
}

// writeRefs adds up what was captured, once all of it is, and writes the
// references.
func (w *snapshotWriter) writeRefs(ctx context.Context) error {
	refs := &manifest.Refs{}
	for _, c := range w.chunks {
		select {
		case <-c.encoded:
		case <-ctx.Done(): // as when a chunk failed
			return ctx.Err()
		}
		w.totals.Segments += c.totals.Segments
		w.totals.Rows += c.totals.Rows
		w.totals.Files += c.totals.Files
		w.totals.Bytes += c.totals.Bytes
		w.totals.Builds += c.totals.Builds
		w.totals.Straddling += c.totals.Straddling
		w.straddling = append(w.straddling, c.straddling[:min(len(c.straddling), maxStraddling-len(w.straddling))]...)
		w.lackingAll += c.lackingAll
		w.lacking = append(w.lacking, c.lacking[:min(len(c.lacking), maxStraddling-len(w.lacking))]...)
		refs.Segments = append(refs.Segments, c.refs.Segments...)
		refs.Builds = append(refs.Builds, c.refs.Builds...)
		refs.Files = append(refs.Files, c.refs.Files...)
		c.refs = manifest.Refs{}
	}
	if w.lackingAll > 0 {
		w.m.log.Warn("the snapshot lacks segments that are FLUSHED with rows and have no file of them: an earlier release "+
			"let them in; give them their files with UpdateSegments, or drop them", zap.Int64("snapshot", w.snap.ID),
			zap.Int("segments", w.lackingAll), zap.Int64s("first", w.lacking))
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

// finish writes the metadata, and makes the committed record.
func (w *snapshotWriter) finish(ctx context.Context) (*Snapshot, error) {
	next := w.snap.moved(Committed, "")
	next.CatalogRevision, next.Totals, next.beginRev = w.view.Revision, w.totals, w.snap.Revision
	next.DB, next.CollectionName = w.view.Collection.DB, w.view.Collection.Name
	md := describe(next, w.view, w.m.o.Cluster.ID, w.m.o.Release)
	for _, p := range md.Partitions {
		next.Partitions = append(next.Partitions, p.ID)
	}
	for _, ch := range md.Channels {
		next.Cuts = append(next.Cuts, Cut{Shard: ch.Shard, Channel: ch.Name, Timestamp: ch.Cut})
	}
	md.Totals = manifest.Totals{
		Segments: w.totals.Segments, Rows: w.totals.Rows, Files: w.totals.Files, Bytes: w.totals.Bytes,
		Builds: w.totals.Builds, Straddling: w.totals.Straddling,
	}
	var ordinal, build int64
	for _, c := range w.chunks {
		if c.totals.Segments == 0 {
			continue
		}
		md.Manifests = append(md.Manifests, manifest.ManifestFile{
			File: manifest.ManifestName(c.number), Digest: c.digest, FirstOrdinal: ordinal, FirstBuild: build,
			Segments: c.totals.Segments, Rows: c.totals.Rows, Builds: c.totals.Builds, Files: c.totals.Files, Bytes: c.totals.Bytes,
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
	next.Metadata, next.refs = manifest.Sum(data), w.refsFile
	next.ManifestBytes += w.refsFile.Length + int64(len(data))
	w.m.gc.Prime(next.ID, next.Metadata, w.refs)
	return next, nil
}

// verify has group ask the stores for every file of the segment, which it does
// not keep. It waits while group is busy.
func (m *Manager) verify(ctx context.Context, group *errgroup.Group, roots []catalog.Root, s *segment.Segment, lease *createLease) {
	id := s.ID
	for f := range s.AllFiles() {
		file := *f
		group.Go(func() error {
			err := lease.persist(ctx, func() error {
				return pastRefusals(ctx, func() error { return m.verifyFile(ctx, roots[file.Root], &file, id) })
			})
			if err != nil {
				return err
			}
			return lease.advance(ctx)
		})
	}
}

// pastRefusals repeats do while the store refuses in a way that may pass, up to
// putAttempts times: one refusal among the requests of a create does not end it.
func pastRefusals(ctx context.Context, do func() error) (err error) {
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

// putOnce writes an object of the snapshot's own. After an answer that is no
// answer, or says that the key is taken, it reads back: equal bytes are what an
// earlier try wrote.
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
			case errors.Is(err, object.ErrUnavailable): // what holds the key is not known
				last = err
			case err != nil:
			case bytes.Equal(there, data):
				return nil
			default: // or it was not read as it is there
				last = fmt.Errorf("%w with other content; snapshotd's prefix must be its own", object.ErrExists)
			}
		}
		return last
	})
	if errors.Is(err, object.ErrExists) && m.o.Epoch != nil && m.isOfAnotherStore(ctx, key, data, lease) {
		m.catalog.ForgetStock(ctx)
		err = m.o.Epoch.Alarm(ctx, key)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	return lease.advance(ctx)
}

// maxEvidence bounds what is read of an object that holds the key of another.
const maxEvidence = 4 << 20

// isOfAnotherStore reports whether the object under a key of a new snapshot proves
// that the snapshot's id was handed out before: it is not data, two reads agree,
// and snapshotd wrote it as an object of that key. An alarm stops the whole
// cluster, so a read that was altered, and an object of another program, are none:
// they fail the create alone.
func (m *Manager) isOfAnotherStore(ctx context.Context, key string, data []byte, lease *createLease) bool {
	var reads [2][]byte
	for i := range reads {
		err := lease.persist(ctx, func() (err error) {
			reads[i], err = object.ReadAll(ctx, m.store, key, maxEvidence)
			return err
		})
		if err != nil {
			return false
		}
	}
	there := reads[0]
	return bytes.Equal(there, reads[1]) && !bytes.HasPrefix(data, there) && manifest.WrittenAs(key, there)
}
