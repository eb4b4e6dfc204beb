//go:build unix

// Package file implements [object.Store] on a directory: an object is a regular file whose
// path below the directory is its key. It is the default for one process on one machine.
//
// A body is written to a temporary file in [TempDir], synced, and then renamed (Put) or
// hard-linked (Create) to its name, so that an object is never partially visible. The
// directory and newly created parents are synced before a write returns. The file system
// must have hard links. Copies are written in the same way, and share their blocks with the
// source if the file system supports it.
//
// An ETag consists of a file's size and modification time in nanoseconds. Copies of the
// directory that keep the times (cp -a, rsync -a) have the same ETags. ETags of earlier
// releases have the inode as a third part, which [object.SameETag] ignores. Each write of
// the store has a unique time, regardless of the clock's resolution: see [Store.stamp]. A
// foreign write with the same size and time is undetected, for example two writes in one
// tick of the file system's clock.
//
// Limits that S3 does not have: an element of a key has at most 255 bytes, and no key may
// be the directory of another, such as "a" and "a/b". Both are refused with an error that
// wraps [object.ErrInvalidKey]. Directories are created with their first object and removed
// with their last.
//
// The store accesses nothing outside of the directory, regardless of symbolic links in it.
// Links, devices and files with invalid keys as names are not objects: Head does not find
// them and List skips them.
//
// A directory is opened by one process, the default, or shared by any number of processes.
// The latter sync all parent directories of each write: a process cannot know whether
// another one has created a directory and not synced it yet. A lock on [TempDir] while the
// store is open excludes a mix of both modes ([ErrInUse]), on file systems with locks.
//
// A directory may be removed, moved or replaced while the store is open, and a file system
// may be unmounted and mounted again. Once a second a call compares the open directory with
// the one at its path:
//
//	at the path                   | the call
//	the open directory            | continues
//	nothing, or no reply          | fails with ErrUnavailable; the next call compares again
//	a directory with another      | likewise: a mount point may be empty temporarily
//	mark, or without a mark       |
//	a directory with that mark    | uses that directory from now on
//
// "Not found" requires an existing directory. If the directory was removed, its objects are
// unknown, and the call fails with ErrUnavailable.
package file

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TempDir is the directory inside a store for temporary files. It is not part of the key
// space: keys and prefixes that begin with it are invalid, and List omits it.
const TempDir = ".snapshotd-tmp"

// ErrInUse means that another store is open on the directory, and that at least one of the
// two is not shared.
var ErrInUse = errors.New("object store directory in use")

const (
	fileMode = 0o640
	dirMode  = 0o750
	// maxRaces bounds how often a write recreates a directory that a concurrent Delete
	// has pruned. More than a few races indicate another failure, such as the removal
	// of the store's directory.
	maxRaces = 100
)

// Options configure a store.
type Options struct {
	// StaleAfter is the age at which Open removes temporary files as leftovers of a
	// crash. Default: 24 hours.
	StaleAfter time.Duration
	// Shared allows other processes with Shared to write to the directory. Default: the
	// store is exclusive, and Open fails with ErrInUse if another one is open.
	Shared bool
	// Mark is the key of an object with unique content. A replacement of the open
	// directory is used if its mark is equal. Default: none, so no replacement is used.
	Mark string
}

// Store is an object store on a directory. Use [Open].
type Store struct {
	o     Options
	path  string // of the directory, absolute
	tree  atomic.Pointer[tree]
	names string        // prefix of this process's temporary names
	count atomic.Uint64 // suffix of temporary names

	verifyMu    sync.Mutex
	verifyEvery time.Duration
	verified    atomic.Int64 // Unix nanoseconds when current last found the directory at its path
	mark        []byte       // the content of Options.Mark; nil: unknown

	// dirs orders the naming of files and the creation of directories: files are named
	// under a read lock, directories are created and their parents synced under a write
	// lock. So an existing directory is durable. Pruning takes no lock: a write that
	// loses its directory recreates it.
	dirs sync.RWMutex

	stampMu   sync.Mutex
	lastStamp time.Time // the last stamp
}

var _ object.Store = (*Store)(nil)

// Open returns the store on dir, which it creates if necessary, and removes stale temporary
// files. Call Close after use.
func Open(dir string, o Options) (*Store, error) {
	if o.StaleAfter == 0 {
		o.StaleAfter = 24 * time.Hour
	}
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return nil, fmt.Errorf("open object store: %w", err)
	}
	path, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open object store: %w", err)
	}
	s := &Store{o: o, path: path, names: rand.Text(), verifyEvery: verifyEvery}
	t, err := s.openTree()
	if err != nil {
		return nil, fmt.Errorf("open object store %s: %w", dir, err)
	}
	s.tree.Store(t)
	if t.lock != nil {
		err = s.prepareTemp(o.StaleAfter)
	}
	if err != nil && !errors.Is(err, object.ErrDenied) { // a read-only directory is usable
		return nil, errors.Join(fmt.Errorf("open object store %s: %w", dir, err), s.Close())
	}
	return s, nil
}

// acquire creates TempDir and locks it, exclusively unless the store is shared. A read-only
// directory without TempDir is not locked.
func (s *Store) acquire(t *tree) error {
	made := t.root.Mkdir(TempDir, dirMode)
	if errors.Is(made, fs.ErrExist) {
		made = nil
	}
	dir, err := t.root.Open(TempDir)
	switch {
	case errors.Is(s.failed(made), object.ErrDenied) && errors.Is(err, fs.ErrNotExist):
		return nil
	case made != nil:
		return s.failed(made)
	case err != nil:
		return s.failed(err)
	}
	t.lock = dir
	how := unix.LOCK_EX
	if s.o.Shared {
		how = unix.LOCK_SH
	}
	switch err := unix.Flock(int(dir.Fd()), how|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return fmt.Errorf("%w: another process has it open", ErrInUse)
	case errors.Is(err, unix.EBADF), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOLCK),
		errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENOTSUP): // no locks of directories
		return nil
	default:
		return err
	}
}

// Close releases the directory. Readers that Get returned stay valid.
func (s *Store) Close() error {
	s.verifyMu.Lock()
	defer s.verifyMu.Unlock()
	return s.tree.Load().close()
}

func (s *Store) prepareTemp(staleAfter time.Duration) error {
	if err := s.sync("."); err != nil {
		return s.failed(err)
	}
	now, err := s.Now(context.Background())
	if err != nil {
		return err
	}
	entries, err := s.readDir(TempDir)
	if err != nil {
		return s.failed(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || now.Sub(info.ModTime()) < staleAfter {
			continue
		}
		if err := s.unlink(path.Join(TempDir, e.Name()), 0); err != nil && !isGone(err) {
			return s.failed(err)
		}
	}
	return nil
}

// Put implements [object.Store].
func (s *Store) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	return s.write(ctx, "put", key, fillWith(body), func(temp string) error { return s.replace(temp, key) })
}

// replace renames the temporary file to key, and replaces an existing file.
func (s *Store) replace(temp, key string) error {
	err := s.root().Rename(temp, key)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.EISDIR) {
		return fmt.Errorf("%w: it is a directory", object.ErrInvalidKey)
	}
	return err
}

func fillWith(body []byte) func(*os.File) error {
	return func(f *os.File) error {
		_, err := f.Write(body)
		return err
	}
}

// Create implements [object.Store].
func (s *Store) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	return s.write(ctx, "create", key, fillWith(body), func(temp string) error {
		err := s.root().Link(temp, key)
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		switch info, err := s.root().Lstat(key); {
		case err != nil: // install retries if the file was removed meanwhile
			return err
		case info.IsDir():
			return fmt.Errorf("%w: it is a directory", object.ErrInvalidKey)
		}
		return object.ErrExists
	})
}

// write creates a temporary file, writes it by fill, and names it by name.
func (s *Store) write(
	ctx context.Context, op, key string, fill func(*os.File) error, name func(temp string) error,
) (object.Info, error) {
	if err := s.check(ctx, key); err != nil {
		return object.Info{}, err
	}
	temp, stat, err := s.writeTemp(fill)
	if err == nil {
		err = s.install(ctx, key, func() error { return name(temp) })
	}
	if temp != "" { // absent after a rename, else unused
		_ = s.unlink(temp, 0)
	}
	if err != nil {
		return object.Info{}, s.classify(op, key, err)
	}
	return describe(key, stat), nil
}

// writeTemp writes a new temporary file by fill and syncs it. The name is not empty if there
// is a file to remove, also with an error.
func (s *Store) writeTemp(fill func(*os.File) error) (name string, stat fs.FileInfo, err error) {
	name = fmt.Sprintf("%s/%s-%d", TempDir, s.names, s.count.Add(1))
	f, err := s.root().OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fileMode)
	if err != nil {
		return "", nil, err
	}
	err = fill(f)
	if err == nil {
		err = s.stamp(name, f)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		stat, err = f.Stat()
	}
	return name, stat, errors.Join(err, f.Close())
}

// sameTick is the maximum distance of a stamp ahead of the file system's clock. A larger
// distance means that the clock was set back.
const sameTick = time.Second

// stamp gives a complete temporary file a modification time that is unique among the files
// of this store: a nanosecond after the last one if the clock has not advanced. So a
// replaced object gets another ETag even with the same size.
func (s *Store) stamp(name string, f *os.File) error {
	stat, err := f.Stat()
	if err != nil {
		return err
	}
	s.stampMu.Lock()
	stamp := stat.ModTime()
	moved := false
	if ahead := s.lastStamp.Sub(stamp); ahead >= 0 && ahead < sameTick {
		stamp, moved = s.lastStamp.Add(time.Nanosecond), true
	}
	s.lastStamp = stamp
	s.stampMu.Unlock()
	if !moved {
		return nil
	}
	return s.root().Chtimes(name, time.Time{}, stamp)
}

// install calls name, which names a file key, in an existing directory, and makes the name
// durable. It recreates the directory if it is pruned concurrently.
func (s *Store) install(ctx context.Context, key string, name func() error) error {
	dir := path.Dir(key)
	for range maxRaces {
		s.dirs.RLock()
		err := name()
		s.dirs.RUnlock()
		if err == nil {
			return s.syncUp(dir)
		}
		if errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("%w: a part of its path is an object", object.ErrInvalidKey)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.makeDir(dir); err != nil {
			return err
		}
	}
	return fmt.Errorf("directory %s is removed repeatedly", dir)
}

// syncUp makes an object's name in dir durable, and in a shared store also the names of dir
// and of its parents.
func (s *Store) syncUp(dir string) error {
	for {
		// A missing directory was pruned after the delete of this object.
		if err := s.sync(dir); err != nil && !isGone(err) {
			return err
		}
		if !s.o.Shared || dir == "." {
			return nil
		}
		dir = path.Dir(dir)
	}
}

// makeDir creates dir and its parents durably. install handles the case that dir is removed
// again before the return.
func (s *Store) makeDir(dir string) error {
	s.dirs.Lock()
	defer s.dirs.Unlock()
	for i := range len(dir) + 1 {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		part := dir[:i]
		switch err := s.root().Mkdir(part, dirMode); {
		case err == nil:
			if err := s.sync(path.Dir(part)); err != nil && !isGone(err) {
				return err
			}
		case errors.Is(err, fs.ErrExist): // name detects a file in its place
		case errors.Is(err, fs.ErrNotExist): // pruned meanwhile: install retries
			return nil
		case errors.Is(err, unix.ENOTDIR):
			return fmt.Errorf("%w: a part of its path is an object", object.ErrInvalidKey)
		default:
			return err
		}
	}
	return nil
}

// Get implements [object.Store].
func (s *Store) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object.Info, error) {
	if err := s.check(ctx, key); err != nil {
		return nil, object.Info{}, err
	}
	if offset < 0 {
		return nil, object.Info{}, fmt.Errorf("get %s: negative offset %d", key, offset)
	}
	f, err := s.openFile(key)
	if err != nil {
		return nil, object.Info{}, s.classify("get", key, s.missing(err))
	}
	stat, err := f.Stat()
	if err == nil && !stat.Mode().IsRegular() {
		err = object.ErrNotFound
	}
	if err != nil {
		_ = f.Close() // read only
		return nil, object.Info{}, s.classify("get", key, err)
	}
	info := describe(key, stat)
	offset = min(offset, info.Size)
	if length < 0 {
		length = info.Size
	}
	return &reader{Reader: io.NewSectionReader(f, offset, min(length, info.Size-offset)), file: f}, info, nil
}

// reader reads a part of a file. An object's file is never modified, so the content is one
// version even while the key is replaced or deleted.
type reader struct {
	io.Reader
	file *os.File
}

func (r *reader) Close() error { return r.file.Close() }

// Head implements [object.Store].
func (s *Store) Head(ctx context.Context, key string) (object.Info, error) {
	if err := s.check(ctx, key); err != nil {
		return object.Info{}, err
	}
	stat, err := s.root().Lstat(key)
	if err == nil && !stat.Mode().IsRegular() {
		err = object.ErrNotFound
	}
	if err != nil {
		return object.Info{}, s.classify("head", key, s.missing(err))
	}
	return describe(key, stat), nil
}

// List implements [object.Store]. It keeps the entries of one directory per level in
// memory. It may or may not show concurrent writes and deletes.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		err := object.CheckPrefix(prefix)
		if dir := strings.TrimSuffix(prefix, "/"); err == nil && dir != "" {
			err = check(ctx, dir)
		}
		if err == nil {
			err = s.current()
		}
		if err != nil {
			yield(object.Info{}, err)
			return
		}
		_, err = s.list(ctx, prefix, func(info object.Info) bool { return yield(info, nil) })
		if err != nil {
			yield(object.Info{}, err)
		}
	}
}

// list yields the objects below prefix until yield returns false. It returns more false if
// yield did.
func (s *Store) list(ctx context.Context, prefix string, yield func(object.Info) bool) (more bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	entries, err := s.readDir(path.Clean(prefix))
	if isGone(err) {
		err = s.lost()
		if err == nil {
			return true, nil
		}
	}
	if err != nil {
		return false, s.classify("list", prefix, err)
	}
	// Sorted by plain names, "a/b" would precede "a-b", because "a" does.
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(sortName(a), sortName(b)) })
	for _, e := range entries {
		key := prefix + e.Name()
		if err := check(ctx, key); errors.Is(err, object.ErrInvalidKey) {
			continue // a foreign file, or TempDir
		} else if err != nil {
			return false, err
		}
		if e.IsDir() {
			if more, err := s.list(ctx, key+"/", yield); !more {
				return false, err
			}
			continue
		}
		stat, err := e.Info()
		if isGone(err) { // deleted meanwhile
			continue
		}
		if err != nil {
			return false, s.classify("list", key, err)
		}
		if !stat.Mode().IsRegular() {
			continue // not an object
		}
		if !yield(describe(key, stat)) {
			return false, nil
		}
	}
	return true, nil
}

func sortName(e fs.DirEntry) string {
	if e.IsDir() {
		return e.Name() + "/"
	}
	return e.Name()
}

// Delete implements [object.Store]. The removal is durable when it returns.
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	var errs []error
	failed := func(key string, err error) {
		errs = append(errs, &object.DeleteError{Key: key, Err: err})
	}
	touched := make(map[string]string) // directory to sync → a key deleted below it
	for _, key := range keys {
		if err := s.check(ctx, key); err != nil {
			failed(key, err)
			continue
		}
		err := s.unlink(key, 0)
		if isGone(err) {
			if lost := s.lost(); lost != nil {
				failed(key, s.classify("delete", key, lost))
				continue
			}
		}
		if err != nil && !isGone(err) && !s.isDir(key) {
			failed(key, s.classify("delete", key, err))
			continue
		}
		touched[s.prune(path.Dir(key))] = key
	}
	for dir, key := range touched {
		if err := s.sync(dir); err != nil && !isGone(err) {
			failed(key, s.classify("delete", key, err))
		}
	}
	return object.Join(errs...)
}

func (s *Store) isDir(key string) bool {
	stat, err := s.root().Lstat(key)
	return err == nil && stat.IsDir()
}

// prune removes dir and its parents while they are empty, and returns the first that
// remains.
func (s *Store) prune(dir string) string {
	for dir != "." {
		// Remove directories only: the name may have become an object. A missing
		// directory may have been pruned concurrently.
		if err := s.unlink(dir, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return dir
		}
		dir = path.Dir(dir)
	}
	return dir
}

// Now implements [object.Store] by the file system's clock, which sets modification times.
// It sets the modification time of [TempDir], which works in a full store as it needs no
// inode.
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	if err := ctx.Err(); err != nil {
		return time.Time{}, err
	}
	if err := s.current(); err != nil {
		return time.Time{}, fmt.Errorf("read clock: %w", err)
	}
	dir, err := s.root().Open(TempDir)
	if err != nil {
		return time.Time{}, fmt.Errorf("read clock: %w", s.failed(err))
	}
	err = touch(dir)
	stat, statErr := dir.Stat()
	if err := errors.Join(err, statErr, dir.Close()); err != nil {
		return time.Time{}, fmt.Errorf("read clock: %w", s.failed(err))
	}
	return stat.ModTime(), nil
}

// unlink removes a file, or with unix.AT_REMOVEDIR an empty directory. Unlike
// [os.Root.Remove] it never removes the other kind.
func (s *Store) unlink(name string, flags int) error {
	dir, err := s.root().Open(path.Dir(name))
	if err != nil {
		return err
	}
	err = unix.Unlinkat(int(dir.Fd()), path.Base(name), flags)
	return errors.Join(err, dir.Close())
}

// openFile opens a file for reading. It fails for a symbolic link and does not block on a
// pipe.
func (s *Store) openFile(name string) (*os.File, error) {
	dir, err := s.root().Open(path.Dir(name))
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat(int(dir.Fd()), path.Base(name), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err := errors.Join(err, dir.Close()); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (s *Store) readDir(name string) ([]fs.DirEntry, error) {
	dir, err := s.root().Open(name)
	if err != nil {
		return nil, err
	}
	entries, err := dir.ReadDir(-1)
	return entries, errors.Join(err, dir.Close())
}

// sync makes the entries of the directory durable.
func (s *Store) sync(name string) error {
	dir, err := s.root().Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// check returns an error if key is invalid in this store or if ctx has ended.
func check(ctx context.Context, key string) error {
	if err := object.CheckKey(key); err != nil {
		return err
	}
	if first, _, _ := strings.Cut(key, "/"); first == TempDir {
		return fmt.Errorf("%w %q: %s is reserved", object.ErrInvalidKey, key, TempDir)
	}
	return ctx.Err()
}

// describe returns the Info of a file.
func describe(key string, stat fs.FileInfo) object.Info {
	return object.Info{
		Key:     key,
		Size:    stat.Size(),
		ETag:    fmt.Sprintf("%x-%x", stat.Size(), stat.ModTime().UnixNano()),
		ModTime: stat.ModTime(),
	}
}

// isGone reports whether err means that the name does not exist, which includes that a part
// of its path is a file.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}
