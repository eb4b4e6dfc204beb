// Package memory implements [object.Store] in memory, for tests and simulations. It
// fulfils the whole contract and passes the suite in objecttest. Its ETags are those of S3:
// the MD5 of the content in hex, and for a copy in parts the MD5 of the parts' MD5s, a dash
// and their number.
package memory

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Options configure a store.
type Options struct {
	// Now is the store's clock. Default: time.Now.
	Now func() time.Time
}

// Store is an object store in memory. Use [New].
type Store struct {
	now func() time.Time

	mu      sync.RWMutex
	objects map[string]stored // values are replaced, never modified
}

var _ object.Store = (*Store)(nil)

type stored struct {
	body []byte
	info object.Info
}

// New returns an empty store.
func New(o Options) *Store {
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Store{now: o.Now, objects: make(map[string]stored)}
}

// Put implements [object.Store].
func (s *Store) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	return s.write(ctx, key, body, false)
}

// Create implements [object.Store].
func (s *Store) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	return s.write(ctx, key, body, true)
}

func (s *Store) write(ctx context.Context, key string, body []byte, create bool) (object.Info, error) {
	if err := check(ctx, key); err != nil {
		return object.Info{}, err
	}
	sum := md5.Sum(body) // an ETag, not for security
	o := stored{
		body: bytes.Clone(body),
		info: object.Info{Key: key, Size: int64(len(body)), ETag: hex.EncodeToString(sum[:])},
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.objects[key]; ok && create {
		return object.Info{}, fmt.Errorf("create %s: %w", key, object.ErrExists)
	}
	o.info.ModTime = s.now()
	s.objects[key] = o
	return o.info, nil
}

// Get implements [object.Store].
func (s *Store) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object.Info, error) {
	o, err := s.find(ctx, "get", key)
	if err != nil {
		return nil, object.Info{}, err
	}
	o.info.SourceETag = "" // only Head returns it
	if offset < 0 {
		return nil, object.Info{}, fmt.Errorf("get %s: negative offset %d", key, offset)
	}
	rest := o.body[min(offset, o.info.Size):]
	if length >= 0 {
		rest = rest[:min(length, int64(len(rest)))]
	}
	return io.NopCloser(bytes.NewReader(rest)), o.info, nil
}

// Head implements [object.Store].
func (s *Store) Head(ctx context.Context, key string) (object.Info, error) {
	o, err := s.find(ctx, "head", key)
	return o.info, err
}

func (s *Store) find(ctx context.Context, op, key string) (stored, error) {
	if err := check(ctx, key); err != nil {
		return stored{}, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.objects[key]
	if !ok {
		return stored{}, fmt.Errorf("%s %s: %w", op, key, object.ErrNotFound)
	}
	return o, nil
}

// List implements [object.Store]. The sequence yields the objects that exist at its start.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		if err := object.CheckPrefix(prefix); err != nil {
			yield(object.Info{}, err)
			return
		}
		for _, info := range s.matching(prefix) {
			if err := ctx.Err(); err != nil {
				yield(object.Info{}, err)
				return
			}
			if !yield(info, nil) {
				return
			}
		}
		if err := ctx.Err(); err != nil {
			yield(object.Info{}, err)
		}
	}
}

func (s *Store) matching(prefix string) []object.Info {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var found []object.Info
	for key, o := range s.objects {
		if strings.HasPrefix(key, prefix) {
			o.info.SourceETag = "" // only Head returns it
			found = append(found, o.info)
		}
	}
	slices.SortFunc(found, func(a, b object.Info) int { return strings.Compare(a.Key, b.Key) })
	return found
}

// Delete implements [object.Store].
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	var errs []error
	for _, key := range keys {
		if err := check(ctx, key); err != nil {
			errs = append(errs, &object.DeleteError{Key: key, Err: err})
			continue
		}
		s.mu.Lock()
		delete(s.objects, key)
		s.mu.Unlock()
	}
	return object.Join(errs...)
}

// Copy implements [object.Store].
func (s *Store) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if err := r.Check(); err != nil {
		return object.Info{}, err
	}
	if err := ctx.Err(); err != nil {
		return object.Info{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	source, ok := s.objects[r.From]
	switch {
	case !ok:
		return object.Info{}, fmt.Errorf("copy %s to %s: %w", r.From, r.To, object.ErrNotFound)
	case !object.SameETag(source.info.ETag, r.SourceETag) || source.info.Size != r.Size:
		return object.Info{}, fmt.Errorf("copy %s to %s: %w", r.From, r.To, object.ErrSourceChanged)
	}
	target := stored{body: source.body, info: source.info}
	target.info.Key, target.info.ModTime = r.To, s.now()
	if parts, size := r.Parts.Split(r.Size); parts > 0 {
		target.info.ETag, target.info.SourceETag = partsETag(source.body, size), r.SourceETag
	} else {
		sum := md5.Sum(source.body)
		target.info.ETag = hex.EncodeToString(sum[:])
	}
	s.objects[r.To] = target
	target.info.SourceETag = ""
	return target.info, nil
}

// partsETag returns the ETag of an object that was made of parts of the size.
func partsETag(body []byte, size int64) string {
	all, n := md5.New(), 0
	for part := range slices.Chunk(body, int(size)) {
		sum := md5.Sum(part)
		all.Write(sum[:])
		n++
	}
	return fmt.Sprintf("%x-%d", all.Sum(nil), n)
}

// AbortUploads implements [object.Store]. The store has no uploads.
func (s *Store) AbortUploads(ctx context.Context, prefix string, _ time.Time) (int, error) {
	if err := object.CheckPrefix(prefix); err != nil {
		return 0, err
	}
	return 0, ctx.Err()
}

// OldestUpload implements [object.Store]. The store has no uploads.
func (s *Store) OldestUpload(ctx context.Context, prefix string) (time.Time, error) {
	if err := object.CheckPrefix(prefix); err != nil {
		return time.Time{}, err
	}
	return time.Time{}, ctx.Err()
}

// Now implements [object.Store].
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	if err := ctx.Err(); err != nil {
		return time.Time{}, err
	}
	return s.now(), nil
}

func check(ctx context.Context, key string) error {
	if err := object.CheckKey(key); err != nil {
		return err
	}
	return ctx.Err()
}
