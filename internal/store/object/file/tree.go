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

// lookEvery is how often the directory that is open is compared with the one that has
// its path.
const lookEvery = time.Second

// maxMark bounds what is compared of a mark, in bytes.
const maxMark = 64 << 10

// tree is a directory that is open.
type tree struct {
	root *os.Root
	lock *os.File // TempDir, locked; nil: there is none that could be
}

func (t *tree) close() error {
	if t.lock == nil {
		return t.root.Close()
	}
	return errors.Join(t.lock.Close(), t.root.Close())
}

// root is the directory that calls work on.
func (s *Store) root() *os.Root { return s.tree.Load().root }

// openTree opens the directory that has the path of the store, for itself.
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

// check says whether key may be used in this store, whether ctx is over, and whether
// the directory is the one that it was.
func (s *Store) check(ctx context.Context, key string) error {
	if err := check(ctx, key); err != nil {
		return err
	}
	return s.current()
}

// current has the store work on the directory that has its path, as the package
// comment says. The error is an ErrUnavailable.
func (s *Store) current() error {
	if s.sinceLook() < s.lookEvery {
		return nil
	}
	s.lookMu.Lock()
	defer s.lookMu.Unlock()
	if s.sinceLook() < s.lookEvery { // another call has looked meanwhile
		return nil
	}
	if err := s.look(); err != nil {
		return s.unknown(err)
	}
	s.looked.Store(time.Now().UnixNano())
	return nil
}

func (s *Store) sinceLook() time.Duration {
	since := time.Since(time.Unix(0, s.looked.Load()))
	if since < 0 { // the clock was set back
		return s.lookEvery
	}
	return since
}

// look compares the directories, and opens the one at the path when it has the mark.
func (s *Store) look() error {
	there, err := os.Stat(s.path)
	if err != nil {
		return fmt.Errorf("it is not at its path: %w", err)
	}
	if have, err := s.root().Stat("."); err == nil && os.SameFile(there, have) {
		if s.mark == nil && s.o.Mark != "" {
			s.mark, _ = readMark(s.root(), s.o.Mark) // it may be made later
		}
		return nil
	}
	if s.mark == nil {
		return errors.New("another directory has its path; start again to use that one")
	}
	root, err := os.OpenRoot(s.path)
	if err != nil {
		return err
	}
	mark, err := readMark(root, s.o.Mark)
	if err == nil && !bytes.Equal(mark, s.mark) {
		err = errors.New("it is another")
	}
	if err := errors.Join(err, root.Close()); err != nil {
		return fmt.Errorf("another directory has its path, and %s there is not that of this store: %w", s.o.Mark, err)
	}
	old := s.tree.Load()
	if old.lock != nil {
		_ = old.lock.Close() // calls under way still use the rest, which goes with them
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

// lost says that the directory which is open was removed or does not answer; nil: it
// is there.
func (s *Store) lost() error {
	stat, err := s.root().Stat(".")
	if err == nil {
		if sys, ok := stat.Sys().(*syscall.Stat_t); !ok || sys.Nlink > 0 {
			return nil
		}
		err = errors.New("it was removed")
	}
	s.looked.Store(0) // the next call looks for another
	return s.unknown(err)
}

// unknown is the error for a directory of which nothing is known. The cause is text
// alone, so that the error is of one kind.
func (s *Store) unknown(cause error) error {
	return fmt.Errorf("%w: directory %s: %v", object.ErrUnavailable, s.path, cause) //nolint:errorlint // see above
}
