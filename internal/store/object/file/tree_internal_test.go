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

// place is a store whose directory is replaced. Each call looks at it.
type place struct {
	t    *testing.T
	path string
	s    *Store
}

func newPlace(t *testing.T) *place {
	t.Helper()
	p := &place{t: t, path: filepath.Join(t.TempDir(), "store")}
	s, err := Open(p.path, Options{Mark: "mark"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	s.lookEvery = 0
	p.s = s
	for key, body := range map[string]string{"mark": "1", "a/b": "content"} {
		if _, err := s.Put(t.Context(), key, []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// want checks that each call ends with kind, or for nil well.
func (p *place) want(when string, kind error) {
	p.t.Helper()
	ctx := p.t.Context()
	for name, call := range map[string]func() error{
		"Head": func() error { _, err := p.s.Head(ctx, "a/b"); return err },
		"Get": func() error {
			r, _, err := p.s.Get(ctx, "a/b", 0, -1)
			if err != nil {
				return err
			}
			data, err := io.ReadAll(r)
			if string(data) != "content" {
				p.t.Errorf("%s: read %q", when, data)
			}
			return errors.Join(err, r.Close())
		},
		"List": func() error {
			n := 0
			for _, err := range p.s.List(ctx, "a/") {
				if err != nil {
					return err
				}
				n++
			}
			if n != 1 {
				p.t.Errorf("%s: %d objects are listed", when, n)
			}
			return nil
		},
		"Delete": func() error { return p.s.Delete(ctx, "c/missing") },
		"Put":    func() error { _, err := p.s.Put(ctx, "d", nil); return err },
		"Copy":   func() error { return copyAgain(ctx, p.s) },
		"Now":    func() error { _, err := p.s.Now(ctx); return err },
	} {
		if err := call(); !errors.Is(err, kind) || (err == nil) != (kind == nil) {
			p.t.Errorf("%s, %s: got %v, want %v", when, name, err, kind)
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

func (p *place) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// TestDirectoryGoes removes, moves and replaces the directory of an open store. What
// is not there says nothing of the objects, what is another one is not touched, and
// the right one is used again without another start.
func TestDirectoryGoes(t *testing.T) {
	p := newPlace(t)
	p.want("at first", nil)
	aside := p.path + "-aside"

	p.must(os.Rename(p.path, aside))
	p.want("moved away", object.ErrUnavailable)
	p.must(os.Mkdir(p.path, 0o750)) // a mount point
	p.want("empty", object.ErrUnavailable)
	if left, err := os.ReadDir(p.path); err != nil || len(left) != 0 {
		t.Errorf("the empty directory was written to: %v, %v", left, err)
	}
	p.must(os.WriteFile(filepath.Join(p.path, "mark"), []byte("2"), 0o600))
	p.want("of another store", object.ErrUnavailable)
	p.must(os.RemoveAll(p.path))
	p.must(os.Rename(aside, p.path))
	p.want("back", nil)

	p.must(os.CopyFS(aside, os.DirFS(p.path)))
	p.must(os.RemoveAll(p.path))
	p.want("removed", object.ErrUnavailable)
	p.must(os.Rename(aside, p.path))
	p.want("a copy in its place", nil)
	if _, err := Open(p.path, Options{}); !errors.Is(err, ErrInUse) {
		t.Errorf("the copy is not locked: %v", err)
	}
}

// TestRemovedBetweenLooks removes the directory so that no look has noticed: nothing
// is known of the objects all the same.
func TestRemovedBetweenLooks(t *testing.T) {
	p := newPlace(t)
	p.s.lookEvery = lookEvery
	p.want("at first", nil)
	p.must(os.RemoveAll(p.path))
	if _, err := p.s.Head(t.Context(), "a/b"); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("Head: got %v", err)
	}
}

// TestListCannotLook lists a directory whose entries cannot be looked at: an object
// that is left out would pass for one that is not there.
func TestListCannotLook(t *testing.T) {
	p := newPlace(t)
	for _, dir := range []string{p.path, filepath.Dir(p.path), filepath.Dir(filepath.Dir(p.path))} {
		p.must(os.Chmod(dir, 0o755)) //nolint:gosec // another user reads it
	}
	p.must(os.Chmod(filepath.Join(p.path, "a"), 0o444)) //nolint:gosec // names, and nothing else
	unprivileged(t, func() {
		for info, err := range p.s.List(t.Context(), "a/") {
			if !errors.Is(err, object.ErrDenied) {
				t.Errorf("got %v, %v", info, err)
			}
			return
		}
		t.Error("an empty list")
	})
	p.must(os.Chmod(filepath.Join(p.path, "a"), 0o750))
}

// TestReadOnly opens a directory that may only be read: reads work, and writes say
// what is missing.
func TestReadOnly(t *testing.T) {
	p := newPlace(t)
	p.must(p.s.Close())
	p.must(os.Chmod(filepath.Join(p.path, "a/b"), 0o644))
	for _, dir := range []string{filepath.Join(p.path, TempDir), filepath.Join(p.path, "a"), p.path, filepath.Dir(p.path), filepath.Dir(filepath.Dir(p.path))} {
		p.must(os.Chmod(dir, 0o755)) //nolint:gosec // another user reads it
	}
	for _, withTemp := range []bool{true, false} {
		if !withTemp {
			p.must(os.Remove(filepath.Join(p.path, TempDir)))
		}
		p.must(os.Chmod(p.path, 0o555)) //nolint:gosec // another user reads it
		unprivileged(t, func() {
			s, err := Open(p.path, Options{})
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
		p.must(os.Chmod(p.path, 0o755)) //nolint:gosec // so that it can be removed
	}
}

// unprivileged calls do with the rights of an ordinary user to files.
func unprivileged(t *testing.T, do func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		do()
		return
	}
	const nobody = 65534
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(nobody); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setfsuid(0) }()
	do()
}
