//go:build unix

package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// verifyEvery is the interval between comparisons of the open directory with the one at its
// path.
const verifyEvery = time.Second

// maxMark bounds the compared part of a mark, in bytes.
const maxMark = 64 << 10

// tree is an open directory.
type tree struct {
	root *os.Root
	lock *os.File // TempDir, locked; nil: not locked
}

func (t *tree) close() error {
	if t.lock == nil {
		return t.root.Close()
	}
	return errors.Join(t.lock.Close(), t.root.Close())
}

// root returns the open directory.
func (s *Store) root() *os.Root { return s.tree.Load().root }

// openTree opens and locks the directory at the store's path.
func (s *Store) openTree() (*tree, error) {
	root, err := os.OpenRoot(s.path)
	if err != nil {
		return nil, s.failed(err)
	}
	t := &tree{root: root}
	if err := s.acquire(t); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

// check returns an error if key is invalid in this store, if ctx has ended, or if the
// directory is not available.
func (s *Store) check(ctx context.Context, key string) error {
	if err := check(ctx, key); err != nil {
		return err
	}
	return s.current()
}

// current makes the store use the directory at its path, as described in the package
// comment. The error is an ErrUnavailable.
func (s *Store) current() error {
	if s.sinceVerified() < s.verifyEvery {
		return nil
	}
	s.verifyMu.Lock()
	defer s.verifyMu.Unlock()
	if s.sinceVerified() < s.verifyEvery { // verified by a concurrent call
		return nil
	}
	if err := s.verify(); err != nil {
		return s.unknown(err)
	}
	s.verified.Store(time.Now().UnixNano())
	return nil
}

func (s *Store) sinceVerified() time.Duration {
	since := time.Since(time.Unix(0, s.verified.Load()))
	if since < 0 { // the clock was set back
		return s.verifyEvery
	}
	return since
}

// verify compares the directories, and opens the one at the path if it has the mark.
func (s *Store) verify() error {
	atPath, err := os.Stat(s.path)
	if err != nil {
		return fmt.Errorf("it is not at its path: %w", err)
	}
	if opened, err := s.root().Stat("."); err == nil && os.SameFile(atPath, opened) {
		if s.mark == nil && s.o.Mark != "" {
			s.mark, _ = readMark(s.root(), s.o.Mark) // the mark may be written later
		}
		return nil
	}
	if s.mark == nil {
		return errors.New("another directory has its path; restart to use that one")
	}
	root, err := os.OpenRoot(s.path)
	if err != nil {
		return err
	}
	mark, err := readMark(root, s.o.Mark)
	if err == nil && !bytes.Equal(mark, s.mark) {
		err = errors.New("the content differs")
	}
	if err := errors.Join(err, root.Close()); err != nil {
		return fmt.Errorf("another directory has its path, and its %s is not that of this store: %w", s.o.Mark, err)
	}
	old := s.tree.Load()
	if old.lock != nil {
		_ = old.lock.Close() // calls under way still use the root
		old.lock = nil
	}
	t, err := s.openTree()
	if err != nil {
		return err
	}
	s.tree.Store(t)
	return nil
}

// readMark returns the content of the object that marks a directory.
func readMark(root *os.Root, name string) ([]byte, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxMark))
	return data, errors.Join(err, f.Close())
}

// lost returns an error if the open directory was removed or cannot be read.
func (s *Store) lost() error {
	stat, err := s.root().Stat(".")
	if err == nil {
		if sys, ok := stat.Sys().(*syscall.Stat_t); !ok || sys.Nlink > 0 {
			return nil
		}
		err = errors.New("it was removed")
	}
	s.verified.Store(0) // the next call verifies again
	return s.unknown(err)
}

// unknown returns the error for a directory with an unknown state. The cause is included as
// text only, so that the error has one kind.
func (s *Store) unknown(cause error) error {
	return fmt.Errorf("%w: directory %s: %v", object.ErrUnavailable, s.path, cause) //nolint:errorlint // see above
}
