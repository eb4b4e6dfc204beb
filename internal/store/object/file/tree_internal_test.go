//go:build linux

package file

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// env is a store whose directory is replaced. Each call verifies the directory.
type env struct {
	t    *testing.T
	path string
	s    *Store
}

func newEnv(t *testing.T) *env {
	t.Helper()
	e := &env{t: t, path: filepath.Join(t.TempDir(), "store")}
	s, err := Open(e.path, Options{Mark: "mark"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	s.verifyEvery = 0
	e.s = s
	for key, body := range map[string]string{"mark": "1", "a/b": "content"} {
		if _, err := s.Put(t.Context(), key, []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

// want checks that each call fails with kind, or succeeds for nil.
func (e *env) want(when string, kind error) {
	e.t.Helper()
	ctx := e.t.Context()
	for name, call := range map[string]func() error{
		"Head": func() error { _, err := e.s.Head(ctx, "a/b"); return err },
		"Get": func() error {
			r, _, err := e.s.Get(ctx, "a/b", 0, -1)
			if err != nil {
				return err
			}
			data, err := io.ReadAll(r)
			if string(data) != "content" {
				e.t.Errorf("%s: read %q", when, data)
			}
			return errors.Join(err, r.Close())
		},
		"List": func() error {
			n := 0
			for _, err := range e.s.List(ctx, "a/") {
				if err != nil {
					return err
				}
				n++
			}
			if n != 1 {
				e.t.Errorf("%s: %d objects listed", when, n)
			}
			return nil
		},
		"Delete": func() error { return e.s.Delete(ctx, "c/missing") },
		"Put":    func() error { _, err := e.s.Put(ctx, "d", nil); return err },
		"Copy":   func() error { return copyAgain(ctx, e.s) },
		"Now":    func() error { _, err := e.s.Now(ctx); return err },
	} {
		if err := call(); !errors.Is(err, kind) || (err == nil) != (kind == nil) {
			e.t.Errorf("%s, %s: got %v, want %v", when, name, err, kind)
		}
	}
}

func copyAgain(ctx context.Context, s *Store) error {
	info, err := s.Head(ctx, "a/b")
	if err != nil {
		return err
	}
	_, err = s.Copy(ctx, object.CopyRequest{From: "a/b", To: "e", SourceETag: info.ETag, Size: info.Size})
	return err
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// TestDirectoryChanges removes, moves and replaces the directory of an open store. Without
// the directory the objects are unknown, another directory is not modified, and the right
// one is used again without a restart.
func TestDirectoryChanges(t *testing.T) {
	e := newEnv(t)
	e.want("at first", nil)
	aside := e.path + "-aside"

	e.must(os.Rename(e.path, aside))
	e.want("moved away", object.ErrUnavailable)
	e.must(os.Mkdir(e.path, 0o750)) // a mount point
	e.want("empty", object.ErrUnavailable)
	if left, err := os.ReadDir(e.path); err != nil || len(left) != 0 {
		t.Errorf("the empty directory was written to: %v, %v", left, err)
	}
	e.must(os.WriteFile(filepath.Join(e.path, "mark"), []byte("2"), 0o600))
	e.want("of another store", object.ErrUnavailable)
	e.must(os.RemoveAll(e.path))
	e.must(os.Rename(aside, e.path))
	e.want("back", nil)

	e.must(os.CopyFS(aside, os.DirFS(e.path)))
	e.must(os.RemoveAll(e.path))
	e.want("removed", object.ErrUnavailable)
	e.must(os.Rename(aside, e.path))
	e.want("a copy in its place", nil)
	if _, err := Open(e.path, Options{}); !errors.Is(err, ErrInUse) {
		t.Errorf("the copy is not locked: %v", err)
	}
}

// TestRemovedBetweenChecks removes the directory between two checks of its path: the objects
// are then unknown as well.
func TestRemovedBetweenChecks(t *testing.T) {
	e := newEnv(t)
	e.s.verifyEvery = verifyEvery
	e.want("at first", nil)
	e.must(os.RemoveAll(e.path))
	if _, err := e.s.Head(t.Context(), "a/b"); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("Head: got %v", err)
	}
}

// TestListUnreadable lists a directory with unreadable entries: omitting an object would make
// it look deleted.
func TestListUnreadable(t *testing.T) {
	e := newEnv(t)
	for _, dir := range []string{e.path, filepath.Dir(e.path), filepath.Dir(filepath.Dir(e.path))} {
		e.must(os.Chmod(dir, 0o755)) //nolint:gosec // another user reads it
	}
	e.must(os.Chmod(filepath.Join(e.path, "a"), 0o444)) //nolint:gosec // names only
	unprivileged(t, func() {
		for info, err := range e.s.List(t.Context(), "a/") {
			if !errors.Is(err, object.ErrDenied) {
				t.Errorf("got %v, %v", info, err)
			}
			return
		}
		t.Error("an empty list")
	})
	e.must(os.Chmod(filepath.Join(e.path, "a"), 0o750))
}

// TestReadOnly opens a read-only directory: reads succeed, and writes fail with ErrDenied.
func TestReadOnly(t *testing.T) {
	e := newEnv(t)
	e.must(e.s.Close())
	e.must(os.Chmod(filepath.Join(e.path, "a/b"), 0o644))
	for _, dir := range []string{
		filepath.Join(e.path, TempDir), filepath.Join(e.path, "a"), e.path, filepath.Dir(e.path),
		filepath.Dir(filepath.Dir(e.path)),
	} {
		e.must(os.Chmod(dir, 0o755)) //nolint:gosec // another user reads it
	}
	for _, withTemp := range []bool{true, false} {
		if !withTemp {
			e.must(os.Remove(filepath.Join(e.path, TempDir)))
		}
		e.must(os.Chmod(e.path, 0o555)) //nolint:gosec // another user reads it
		unprivileged(t, func() {
			s, err := Open(e.path, Options{})
			if err != nil {
				t.Errorf("with %s %v: %v", TempDir, withTemp, err)
				return
			}
			defer func() { _ = s.Close() }()
			if _, err := s.Head(t.Context(), "a/b"); err != nil {
				t.Errorf("Head: %v", err)
			}
			if r, _, err := s.Get(t.Context(), "a/b", 0, -1); err != nil {
				t.Errorf("Get: %v", err)
			} else {
				_ = r.Close()
			}
			if _, err := s.Put(t.Context(), "new", nil); err == nil || errors.Is(err, object.ErrNotFound) {
				t.Errorf("Put: %v", err)
			}
			if err := s.Delete(t.Context(), "a/b"); err == nil {
				t.Error("Delete: no error")
			}
		})
		e.must(os.Chmod(e.path, 0o755)) //nolint:gosec // to allow its removal
	}
}

// unprivileged calls do with the file permissions of an ordinary user.
func unprivileged(t *testing.T, do func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		do()
		return
	}
	const unprivilegedUser = 65534
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(unprivilegedUser); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setfsuid(0) }()
	do()
}
