//go:build unix

package file_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
)

func TestContract(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return open(t, t.TempDir()) })
}

func TestSharedContract(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return openWith(t, t.TempDir(), file.Options{Shared: true}) })
}

// TestExclusive opens a directory twice: without Shared only after the other is closed.
func TestExclusive(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ first, second, works bool }{
		{false, false, false}, {false, true, false}, {true, false, false}, {true, true, true},
	} {
		first, err := file.Open(dir, file.Options{Shared: c.first})
		if err != nil {
			t.Fatal(err)
		}
		second, err := file.Open(dir, file.Options{Shared: c.second})
		switch {
		case c.works != (err == nil), err != nil && (!errors.Is(err, file.ErrInUse) || !strings.Contains(err.Error(), dir)):
			t.Errorf("%+v: got %v", c, err)
		}
		if err == nil {
			put(t, second, "a/b")
			put(t, first, "a/c")
			if err := second.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
	}
}

func open(t *testing.T, dir string) *file.Store {
	t.Helper()
	return openWith(t, dir, file.Options{})
}

func openWith(t *testing.T, dir string, o file.Options) *file.Store {
	t.Helper()
	s, err := file.Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func put(t *testing.T, s object.Store, key string) {
	t.Helper()
	if _, err := s.Put(t.Context(), key, []byte(key)); err != nil {
		t.Fatal(err)
	}
}

func keys(t *testing.T, s object.Store) string {
	t.Helper()
	var keys []string
	for info, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, info.Key)
	}
	return strings.Join(keys, " ")
}

func TestReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by", "open")
	first := openWith(t, dir, file.Options{Shared: true})
	want, err := first.Put(t.Context(), "a/b", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	second := openWith(t, dir, file.Options{Shared: true})
	if got, err := second.Head(t.Context(), "a/b"); err != nil || got != want {
		t.Errorf("after reopening: %+v, err = %v; want %+v", got, err, want)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "a", "b")); err != nil || string(data) != "x" {
		t.Errorf("the file holds %q, err = %v", data, err)
	}
}

func TestConflictingKeys(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "a/b/c")
	put(t, s, "f")
	for _, key := range []string{"a", "a/b", "f/x", "f/x/y", "a/b/c/d"} {
		if _, err := s.Put(t.Context(), key, nil); !errors.Is(err, object.ErrInvalidKey) {
			t.Errorf("Put %s: err = %v, want ErrInvalidKey", key, err)
		}
		if _, err := s.Create(t.Context(), key, nil); !errors.Is(err, object.ErrInvalidKey) {
			t.Errorf("Create %s: err = %v, want ErrInvalidKey", key, err)
		}
	}
	if got := keys(t, s); got != "a/b/c f" {
		t.Errorf("objects: %s", got)
	}
	long := strings.Repeat("x", 256)
	if _, err := s.Put(t.Context(), long, nil); !errors.Is(err, object.ErrInvalidKey) {
		t.Errorf("Put with a long element: err = %v, want ErrInvalidKey", err)
	}
	if _, err := s.Put(t.Context(), long+"/x", nil); !errors.Is(err, object.ErrInvalidKey) {
		t.Errorf("Put with a long directory: err = %v, want ErrInvalidKey", err)
	}
}

func TestTempDirIsReserved(t *testing.T) {
	s := open(t, t.TempDir())
	for _, key := range []string{file.TempDir, file.TempDir + "/x"} {
		_, putErr := s.Put(t.Context(), key, nil)
		_, _, getErr := s.Get(t.Context(), key, 0, -1)
		_, headErr := s.Head(t.Context(), key)
		for _, err := range []error{putErr, getErr, headErr, s.Delete(t.Context(), key)} {
			if !errors.Is(err, object.ErrInvalidKey) {
				t.Errorf("%s: err = %v, want ErrInvalidKey", key, err)
			}
		}
	}
	for _, err := range s.List(t.Context(), file.TempDir+"/") {
		if !errors.Is(err, object.ErrInvalidKey) {
			t.Errorf("List: err = %v, want ErrInvalidKey", err)
		}
	}
	put(t, s, "a/"+file.TempDir+"/x") // reserved at the top only
	put(t, s, file.TempDir+"2")
	if got, want := keys(t, s), file.TempDir+"2 a/"+file.TempDir+"/x"; got != want {
		t.Errorf("objects: %s, want %s", got, want)
	}
}

func TestNoLeftovers(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "a/b/c")
	put(t, s, "a/b/c")
	if _, err := s.Create(t.Context(), "a/b/d", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), "a/b/d", nil); !errors.Is(err, object.ErrExists) {
		t.Fatalf("err = %v, want ErrExists", err)
	}
	if _, err := s.Put(t.Context(), "a", nil); !errors.Is(err, object.ErrInvalidKey) {
		t.Fatalf("err = %v, want ErrInvalidKey", err)
	}
	if _, err := s.Now(t.Context()); err != nil {
		t.Fatal(err)
	}
	copyAll(t, s)
	if err := s.Delete(t.Context(), "a/b/c", "a/b/d"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"", file.TempDir} {
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != file.TempDir {
				t.Errorf("left: %s", filepath.Join(d, e.Name()))
			}
		}
	}
}

// copyAll makes copies that succeed, are refused, and are canceled, and deletes the only
// resulting object.
func copyAll(t *testing.T, s *file.Store) {
	t.Helper()
	info, err := s.Head(t.Context(), "a/b/c")
	if err != nil {
		t.Fatal(err)
	}
	r := object.CopyRequest{From: info.Key, To: "x/y", SourceETag: info.ETag, Size: info.Size}
	if _, err := s.Copy(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	for to, want := range map[string]error{
		"x": object.ErrInvalidKey, "x/y/z": object.ErrInvalidKey,
		file.TempDir + "/x": object.ErrInvalidKey,
	} {
		r.To = to
		if _, err := s.Copy(t.Context(), r); !errors.Is(err, want) {
			t.Errorf("copy to %s: err = %v, want %v", to, err, want)
		}
	}
	r.To, r.SourceETag = "x/new", info.ETag+"0"
	if _, err := s.Copy(t.Context(), r); !errors.Is(err, object.ErrSourceChanged) {
		t.Errorf("err = %v, want ErrSourceChanged", err)
	}
	if err := s.Delete(t.Context(), "x/y"); err != nil {
		t.Fatal(err)
	}
}

// copyDir copies a directory like cp -a, with the same times and other inodes.
func copyDir(t *testing.T, to, from string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(from, func(name string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		return os.Chtimes(filepath.Join(to, strings.TrimPrefix(name, from)), time.Time{}, info.ModTime())
	}); err != nil {
		t.Fatal(err)
	}
}

// TestCopiedDirectory shows that a copy of a store's directory has the ETags of the original,
// also those recorded by earlier releases.
func TestCopiedDirectory(t *testing.T) {
	dir, moved := t.TempDir(), filepath.Join(t.TempDir(), "moved")
	first := open(t, dir)
	put(t, first, "a/b")
	source, err := first.Head(t.Context(), "a/b")
	if err != nil {
		t.Fatal(err)
	}
	copyDir(t, moved, dir)
	second := open(t, moved)
	if got, err := second.Head(t.Context(), "a/b"); err != nil || !object.SameETag(got.ETag, source.ETag) {
		t.Errorf("in the copy: %+v, %v; it was %+v", got, err, source)
	}
	for i, etag := range []string{source.ETag, source.ETag + "-7a1c"} {
		r := object.CopyRequest{From: "a/b", To: fmt.Sprintf("c/%d", i), SourceETag: etag, Size: source.Size}
		if _, err := second.Copy(t.Context(), r); err != nil {
			t.Errorf("a copy pinned to ETag %s: %v", etag, err)
		}
	}
	// A touched file is another version.
	now := time.Now()
	if err := os.Chtimes(filepath.Join(moved, "a", "b"), now, now); err != nil {
		t.Fatal(err)
	}
	r := object.CopyRequest{From: "a/b", To: "c/d", SourceETag: source.ETag, Size: source.Size}
	if _, err := second.Copy(t.Context(), r); !errors.Is(err, object.ErrSourceChanged) {
		t.Errorf("a touched file: err = %v, want ErrSourceChanged", err)
	}
}

// TestOverwritesDiffer replaces an object within one tick of the file system's clock, each
// time with the same size.
func TestOverwritesDiffer(t *testing.T) {
	s := open(t, t.TempDir())
	seen := map[string]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 50 {
				info, err := s.Put(t.Context(), fmt.Sprintf("k/%d", w%2), []byte{byte(i)})
				mu.Lock()
				if err != nil || seen[info.ETag] {
					t.Errorf("%+v, %v: duplicate ETag", info, err)
				}
				seen[info.ETag] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	now, err := s.Now(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Head(t.Context(), "k/0")
	if err != nil || info.ModTime.After(now.Add(time.Millisecond)) {
		t.Errorf("%+v, %v is later than the clock, %v", info, err, now)
	}
}

// TestCopyIsIndependent modifies the file of a source in place, which no store does, and
// copies from links.
func TestCopyIsIndependent(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	body := strings.Repeat("0123456789abcdef", 64<<10)
	if _, err := s.Put(t.Context(), "a", []byte(body)); err != nil {
		t.Fatal(err)
	}
	then := time.Now().Add(-time.Hour) // so that a write is at another time
	if err := os.Chtimes(filepath.Join(dir, "a"), then, then); err != nil {
		t.Fatal(err)
	}
	source, err := s.Head(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	r := object.CopyRequest{From: "a", To: "b/c", SourceETag: source.ETag, Size: source.Size}
	first, err := s.Copy(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Copy(t.Context(), r)
	if err != nil || again.ETag == first.ETag {
		t.Errorf("copied again: %+v, %v, after %+v", again, err, first)
	}
	f, err := os.OpenFile(filepath.Join(dir, "a"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString("changed")
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "b", "c")); err != nil || string(got) != body {
		t.Errorf("the copy has %d bytes that differ from its source, %v", len(got), err)
	}
	if _, err := s.Copy(t.Context(), r); !errors.Is(err, object.ErrSourceChanged) {
		t.Errorf("a modified file: err = %v, want ErrSourceChanged", err)
	}

	if err := os.Symlink("a", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	r.From = "link"
	if _, err := s.Copy(t.Context(), r); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("a link: err = %v, want ErrNotFound", err)
	}
	r.From = "b"
	if _, err := s.Copy(t.Context(), r); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("a directory: err = %v, want ErrNotFound", err)
	}
}

// closed opens a store and closes it.
func closed(t *testing.T, dir string) {
	t.Helper()
	s, err := file.Open(dir, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOpenRemovesStaleTempFiles(t *testing.T) {
	dir := t.TempDir()
	temp := filepath.Join(dir, file.TempDir)
	closed(t, dir)
	now := time.Now()
	for name, age := range map[string]time.Duration{"old": 25 * time.Hour, "young": 23 * time.Hour} {
		path := filepath.Join(temp, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, now, now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	closed(t, dir)
	if _, err := os.Stat(filepath.Join(temp, "old")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old file: err = %v, want ErrNotExist", err)
	}
	if _, err := os.Stat(filepath.Join(temp, "young")); err != nil {
		t.Errorf("the young file: %v", err)
	}
}

func TestNoEscape(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "real")
	for name, target := range map[string]string{"dir": outside, "file": secret, "inside": "real", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}

	for _, key := range []string{"dir/secret", "file", "inside", "loop", "pipe", "dir"} {
		if _, _, err := s.Get(t.Context(), key, 0, -1); err == nil {
			t.Errorf("Get %s: no error", key)
		}
		if _, err := s.Head(t.Context(), key); err == nil {
			t.Errorf("Head %s: no error", key)
		}
	}
	if _, err := s.Put(t.Context(), "dir/new", nil); err == nil {
		t.Error("Put through a link: no error")
	}
	if err := s.Delete(t.Context(), "dir/secret"); err == nil {
		t.Error("Delete through a link: no error")
	}
	for info, err := range s.List(t.Context(), "dir/") {
		if err == nil {
			t.Errorf("List through a link: %v", info)
		}
	}
	if got := keys(t, s); got != "real" {
		t.Errorf("objects: %s", got)
	}
	put(t, s, "file") // replaces the link, not its target
	if data, err := os.ReadFile(secret); err != nil || string(data) != "secret" {
		t.Errorf("the file outside holds %q, err = %v", data, err)
	}
}

// TestDeleteSparesObjects deletes and prunes directories while other calls use the same names
// for objects.
func TestDeleteSparesObjects(t *testing.T) {
	s := open(t, t.TempDir())
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 150 {
				below := fmt.Sprintf("n/%d", w)
				if _, err := s.Put(t.Context(), below, nil); err == nil {
					if err := s.Delete(t.Context(), below); err != nil {
						t.Error(err)
					}
				} else if !errors.Is(err, object.ErrInvalidKey) {
					t.Errorf("Put %s: %v", below, err)
				}
				if w > 0 {
					continue // only one worker uses the name itself
				}
				if _, err := s.Create(t.Context(), "n", nil); err == nil {
					if _, err := s.Head(t.Context(), "n"); err != nil {
						t.Errorf("round %d: a lost object: %v", i, err)
					}
					if err := s.Delete(t.Context(), "n"); err != nil {
						t.Error(err)
					}
				} else if !errors.Is(err, object.ErrInvalidKey) {
					t.Errorf("Create n: %v", err)
				}
			}
		})
	}
	wg.Wait()
}
