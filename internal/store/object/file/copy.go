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

// copyStep is how many bytes are copied before the context is looked at again.
const copyStep = 64 << 20

// Copy implements [object.Store]. It does not copy in parts and notes no source:
// that a target is equal is not to be proved, so a repeated copy is made anew.
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
	defer func() { _ = source.Close() }() // it is only read
	if err := unchanged(r, source); err != nil {
		return object.Info{}, s.classify(op, r.To, err)
	}
	fill := func(target *os.File) error {
		if err := copyContent(ctx, target, source, r.Size); err != nil {
			return err
		}
		return unchanged(r, source) // by somebody who writes into files
	}
	return s.write(ctx, op, r.To, fill, func(temp string) error { return s.replace(temp, r.To) })
}

// unchanged says whether an open file is the object that is to be copied.
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

// copyContent copies size bytes to a file that is empty: by sharing them, or
// else within the kernel, or else through this process.
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

// AbortUploads implements [object.Store]: what a crash left unfinished, Open
// removes.
func (s *Store) AbortUploads(ctx context.Context, prefix string, _ time.Time) (int, error) {
	if err := object.CheckPrefix(prefix); err != nil {
		return 0, err
	}
	return 0, ctx.Err()
}
