//go:build unix

package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// copyStep is the number of bytes that are copied between two checks of the context.
const copyStep = 64 << 20

// Copy implements [object.Store]. It does not copy in parts and records no source: equality
// of a target cannot be proved, so a repeat copies again.
func (s *Store) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if err := r.Check(); err != nil {
		return object.Info{}, err
	}
	for _, key := range []string{r.From, r.To} {
		if err := s.check(ctx, key); err != nil {
			return object.Info{}, err
		}
	}
	op := fmt.Sprintf("copy %s to", r.From)
	source, err := s.openFile(r.From)
	if err != nil {
		return object.Info{}, s.classify(op, r.To, s.missing(err))
	}
	defer func() { _ = source.Close() }() // read only
	if err := unchanged(r, source); err != nil {
		return object.Info{}, s.classify(op, r.To, err)
	}
	fill := func(target *os.File) error {
		if err := copyContent(ctx, target, source, r.Size); err != nil {
			return err
		}
		return unchanged(r, source) // a foreign process may have modified the file
	}
	return s.write(ctx, op, r.To, fill, func(temp string) error { return s.replace(temp, r.To) })
}

// unchanged returns nil if an open file is the requested version.
func unchanged(r object.CopyRequest, source *os.File) error {
	stat, err := source.Stat()
	switch {
	case err != nil:
		return err
	case !stat.Mode().IsRegular():
		return object.ErrNotFound
	case !object.SameETag(describe(r.From, stat).ETag, r.SourceETag) || stat.Size() != r.Size:
		return object.ErrSourceChanged
	}
	return nil
}

// copyContent copies size bytes to an empty file: by shared blocks, else within the kernel,
// else through this process.
func copyContent(ctx context.Context, target, source *os.File, size int64) error {
	if clone(target, source) == nil {
		return ctx.Err()
	}
	for left := size; left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.CopyN(target, source, min(left, copyStep))
		left -= n
		if errors.Is(err, io.EOF) {
			return object.ErrSourceChanged
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

// AbortUploads implements [object.Store]. The store has no uploads; Open removes leftovers
// of a crash.
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
