//go:build unix

// Package file is an [object.Store] on a directory: an object is a regular file
// whose path below the directory is its key. It is the default for one process
// on one machine.
//
// A body is written to a temporary file in [TempDir], synced, and then renamed
// (Put) or hard-linked (Create) to its name, so that an object is never visible
// in part. The directory, and parents that had to be made, are synced before a
// write returns. The file system must have hard links. A copy is written in the
// same way; it shares its blocks with the source where the file system can.
//
// An ETag is made of a file's size and modification time in nanoseconds, and of
// nothing that a copy of the directory with its times (cp -a, rsync -a) changes.
// ETags of earlier releases have the inode as a third part, which
// [object.SameETag] passes over. What the store itself writes has a time of its
// own, however coarse the clock is: see [Store.stamp]. What others write over a
// file goes unnoticed when size and time stay the same, as when they write twice
// in one tick of the file system's clock.
//
// What a directory cannot do and S3 can: an element of a key longer than 255
// bytes, and two objects one of whose keys is a directory of the other's, as
// "a" and "a/b". Both are refused with an error that wraps
// [object.ErrInvalidKey]. Directories come with their first object and go with
// their last.
//
// Nothing outside the directory is reached, whatever symbolic links it holds.
// Links, devices and files whose names are no valid keys are not objects: Head
// does not find them and List passes over them.
//
// A directory is opened for one process, the default, or shared by any number of
// processes, which then sync the directories above what they write, each time:
// one of them cannot know which directory another has made and not synced yet. A
// lock on [TempDir] for as long as the store is open keeps the two ways apart
// ([ErrInUse]), on file systems that have locks.
//
// A directory may be removed, moved away or replaced while the store is open, and a
// file system unmounted and mounted again. Once a second a call compares the
// directory that is open with the one that has its path:
//
//	at its path there is          | a call
//	the directory that is open    | goes on
//	nothing, or no answer         | ends with ErrUnavailable, and the next looks again
//	a directory with another      | likewise: a mount point may be empty for a while
//	mark, or with none            |
//	a directory with that mark    | works on that one from then on
//
// "Not found" is an answer of a directory that exists. Of one that was removed
// nothing is known, and the call ends with ErrUnavailable.
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

// TempDir is the directory inside a store where bodies are written before they
// get their names. It is no part of the key space: a key or prefix that begins
// with it is invalid, and List does not show it.
const TempDir = ".snapshotd-tmp"

// ErrInUse means that another store is open on the directory, and that one of the
// two is not shared.
var ErrInUse = errors.New("object store directory in use")

const (
	fileMode = 0o640
	dirMode  = 0o750
	// maxRaces bounds how often a write makes its directory again after a
	// Delete has pruned it. More than a few means that something else is wrong,
	// such as a store directory that was itself removed.
	maxRaces = 100
)

// Options configure a store.
type Options struct {
	// StaleAfter is the age at which Open takes a temporary file for one that a
	// crash left behind, and removes it. Default: 24 hours.
	StaleAfter time.Duration
	// Shared says that other processes may write to the directory as well, all of
	// them with Shared. Default: the store has the directory for itself, else Open
	// fails with ErrInUse.
	Shared bool
	// Mark is the key of an object that no other store has with the same content. A
	// directory that takes the place of the one that was opened is used when its mark
	// is equal. Default: none, so no other directory is used.
	Mark string
}

// Store is an object store on a directory. Use [Open].
type Store struct {
	o     Options
	path  string // of the directory, absolute
	tree  atomic.Pointer[tree]
	names string        // makes this process's temporary names its own
	count atomic.Uint64 // makes them differ from each other

	lookMu    sync.Mutex
	lookEvery time.Duration
	looked    atomic.Int64 // when current last found the directory at its path, as Unix nanoseconds
	mark      []byte       // the content of Options.Mark; nil: not known yet

	// dirs orders the giving of names against the making of directories: a name
	// is given under a read lock, a directory made and its parent synced under
	// a write lock. So whoever finds a directory knows that it is durable.
	// Pruning takes no lock: a write that loses its directory makes it again.
	dirs sync.RWMutex

	stampMu   sync.Mutex
	lastStamp time.Time // of the file that was stamped last
}

var _ object.Store = (*Store)(nil)

// Open returns the store on dir, which it creates if need be, and removes stale
// temporary files. Close it after use.
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
	s := &Store{o: o, path: path, names: rand.Text(), lookEvery: lookEvery}
	t, err := s.openTree()
	if err != nil {
		return nil, fmt.Errorf("open object store %s: %w", dir, err)
	}
	s.tree.Store(t)
	if t.lock != nil {
		err = s.prepareTemp(o.StaleAfter)
	}
	if err != nil && !errors.Is(err, object.ErrDenied) { // one that may only be read is read
		return nil, errors.Join(fmt.Errorf("open object store %s: %w", dir, err), s.Close())
	}
	return s, nil
}

// acquire makes TempDir and locks it, exclusively unless the store is shared. A
// directory that may only be read and has no TempDir is not locked.
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
		errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENOTSUP): // a file system without locks of directories
		return nil
	default:
		return err
	}
}

// Close releases the directory. Readers that Get returned stay valid.
func (s *Store) Close() error {
	s.lookMu.Lock()
	defer s.lookMu.Unlock()
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

// replace gives the temporary file the name key, whatever has it.
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
		case err != nil: // if it is gone by now, install tries again
			return err
		case info.IsDir():
			return fmt.Errorf("%w: it is a directory", object.ErrInvalidKey)
		}
		return object.ErrExists
	})
}

// write makes a temporary file that fill fills and has name give it its name.
func (s *Store) write(ctx context.Context, op, key string, fill func(*os.File) error, name func(temp string) error) (object.Info, error) {
	if err := s.check(ctx, key); err != nil {
		return object.Info{}, err
	}
	temp, stat, err := s.writeTemp(fill)
	if err == nil {
		err = s.install(ctx, key, func() error { return name(temp) })
	}
	if temp != "" { // gone after a rename, and of no use otherwise
		_ = s.unlink(temp, 0)
	}
	if err != nil {
		return object.Info{}, s.classify(op, key, err)
	}
	return describe(key, stat), nil
}

// writeTemp has fill fill a new temporary file and makes it durable. The name is
// set if there is a file to remove, even with an error.
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

// sameTick is how far ahead of the file system's clock a stamp may be. A larger
// distance is a clock that was set back.
const sameTick = time.Second

// stamp gives a complete temporary file a modification time that no other file
// has that this store wrote: a nanosecond after the last one, when the clock has
// not moved on since. So an object that is replaced gets another ETag even when
// its size stays the same.
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

// install calls name, which gives a file the name key, in a directory that
// exists and stays, and makes the name durable.
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
	return fmt.Errorf("directory %s keeps vanishing", dir)
}

// syncUp makes an object's name in dir durable and, in a shared store, the names
// of dir and of all directories above it.
func (s *Store) syncUp(dir string) error {
	for {
		// A directory that is gone was pruned, and so this object deleted.
		if err := s.sync(dir); err != nil && !isGone(err) {
			return err
		}
		if !s.o.Shared || dir == "." {
			return nil
		}
		dir = path.Dir(dir)
	}
}

// makeDir makes dir and what it lies in durably. That dir may be gone again on
// return does not matter to install.
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
		case errors.Is(err, fs.ErrExist): // a file in its place: name finds out
		case errors.Is(err, fs.ErrNotExist): // pruned meanwhile: install tries again
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
		_ = f.Close() // it was only read
		return nil, object.Info{}, s.classify("get", key, err)
	}
	info := describe(key, stat)
	offset = min(offset, info.Size)
	if length < 0 {
		length = info.Size
	}
	return &reader{Reader: io.NewSectionReader(f, offset, min(length, info.Size-offset)), file: f}, info, nil
}

// reader reads a part of a file. An object's file is never written to, so what
// it reads is one version even while the key is replaced or deleted.
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

// List implements [object.Store]. It holds one directory of each level in
// memory. Objects written or deleted meanwhile may or may not be seen.
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

// list yields the objects below prefix until yield returns false, and says
// whether it never did.
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
	// By name alone "a/b" would come before "a-b", since "a" does.
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(sortName(a), sortName(b)) })
	for _, e := range entries {
		key := prefix + e.Name()
		if err := check(ctx, key); errors.Is(err, object.ErrInvalidKey) {
			continue // somebody else's file, or TempDir
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

// prune removes dir and then its parents as long as they are empty, and
// returns the first that stays.
func (s *Store) prune(dir string) string {
	for dir != "." {
		// Rmdir, and never a removal of whatever has the name: by now it may be
		// an object. One that is gone already may have been pruned by another.
		if err := s.unlink(dir, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return dir
		}
		dir = path.Dir(dir)
	}
	return dir
}

// Now implements [object.Store]: the file system's clock, which is the one that
// sets modification times. It sets that of [TempDir], which needs no inode, so
// that a full store still has a clock.
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

// unlink removes the file, or with unix.AT_REMOVEDIR the empty directory, of
// that name. Unlike [os.Root.Remove] it never takes one for the other.
func (s *Store) unlink(name string, flags int) error {
	dir, err := s.root().Open(path.Dir(name))
	if err != nil {
		return err
	}
	err = unix.Unlinkat(int(dir.Fd()), path.Base(name), flags)
	return errors.Join(err, dir.Close())
}

// openFile opens the file of that name for reading. It fails on a symbolic
// link and does not block on a pipe.
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

// sync makes durable which names the directory holds.
func (s *Store) sync(name string) error {
	dir, err := s.root().Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// check says whether key may be used in this store, and whether ctx is over.
func check(ctx context.Context, key string) error {
	if err := object.CheckKey(key); err != nil {
		return err
	}
	if first, _, _ := strings.Cut(key, "/"); first == TempDir {
		return fmt.Errorf("%w %q: %s is reserved", object.ErrInvalidKey, key, TempDir)
	}
	return ctx.Err()
}

// describe makes an Info.
func describe(key string, stat fs.FileInfo) object.Info {
	return object.Info{
		Key:     key,
		Size:    stat.Size(),
		ETag:    fmt.Sprintf("%x-%x", stat.Size(), stat.ModTime().UnixNano()),
		ModTime: stat.ModTime(),
	}
}

// isGone says whether err means that there is nothing of the name asked for,
// be it that what should be a directory on the way is a file.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}
