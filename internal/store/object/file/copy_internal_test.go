//go:build unix

package file

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// endless is a context that is over when it has been asked so many times.
type endless struct {
	context.Context //nolint:containedctx // it is one
	left            int
}

func (e *endless) Err() error {
	if e.left--; e.left < 0 {
		return context.Canceled
	}
	return nil
}

// A copy that ends in the middle, or whose source is cut, leaves nothing.
func TestCopyEndsInTheMiddle(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	source, err := s.Put(t.Context(), "a", bytes.Repeat([]byte("x"), 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	r := object.CopyRequest{From: "a", To: "b/c", SourceETag: source.ETag, Size: source.Size}
	ended := 0
	for left := 0; ; left++ {
		_, err := s.Copy(&endless{t.Context(), left}, r)
		if err == nil {
			break
		}
		ended++
		if !errors.Is(err, context.Canceled) {
			t.Errorf("after %d looks: err = %v, want Canceled", left, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "b", "c")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after %d looks there is a target, %v", left, err)
		}
		entries, err := os.ReadDir(filepath.Join(dir, TempDir))
		if err != nil || len(entries) != 0 {
			t.Errorf("after %d looks: left %v, %v", left, entries, err)
		}
	}
	if ended < 3 {
		t.Errorf("the context was looked at %d times", ended)
	}
}

// meddler is a context that changes the source when it is asked.
type meddler struct {
	context.Context //nolint:containedctx // it is one
	left            int
	meddle          func()
}

func (m *meddler) Err() error {
	if m.left--; m.left == 0 {
		m.meddle()
	}
	return nil
}

// A source that somebody writes to during the copy is not the one asked for. It
// is looked at before the copy and after it.
func TestCopyOfWhatChanges(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	body := bytes.Repeat([]byte("x"), 1<<20)
	for name, meddle := range map[string]func(f *os.File) error{
		"written": func(f *os.File) error { _, err := f.WriteAt([]byte("y"), 5); return err },
		"cut":     func(f *os.File) error { return f.Truncate(1000) },
		"longer":  func(f *os.File) error { return f.Truncate(1<<20 + 1) },
	} {
		if _, err := s.Put(t.Context(), "a", body); err != nil {
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
		ctx := &meddler{t.Context(), 4, func() {
			f, err := os.OpenFile(filepath.Join(dir, "a"), os.O_RDWR, 0)
			if err != nil {
				t.Error(err)
				return
			}
			if err := errors.Join(meddle(f), f.Close()); err != nil {
				t.Error(err)
			}
		}}
		_, err = s.Copy(ctx, object.CopyRequest{From: "a", To: "b/c", SourceETag: source.ETag, Size: source.Size})
		if ctx.left > 0 {
			t.Errorf("%s: the context was not asked often enough to meddle", name)
		}
		if !errors.Is(err, object.ErrSourceChanged) {
			t.Errorf("%s: err = %v, want ErrSourceChanged", name, err)
		}
		entries, err := os.ReadDir(filepath.Join(dir, TempDir))
		if err != nil || len(entries) != 0 {
			t.Errorf("%s: left %v, %v", name, entries, err)
		}
	}
}

// copyContent has no need of a file system that shares blocks, and says when
// the source is shorter than it was.
func TestCopyContent(t *testing.T) {
	file := func(name string, body []byte) *os.File {
		f, err := os.OpenFile(filepath.Join(t.TempDir(), name), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		if _, err := f.Write(body); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Seek(0, 0); err != nil {
			t.Fatal(err)
		}
		return f
	}
	body := bytes.Repeat([]byte("0123456789"), 1000)
	for _, size := range []int{0, 1, len(body)} {
		target := file("target", nil)
		if err := copyContent(t.Context(), target, file("source", body[:size]), int64(size)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(target.Name())
		if err != nil || !bytes.Equal(got, body[:size]) {
			t.Errorf("%d bytes: copied %d, %v", size, len(got), err)
		}
	}
	if clone(file("target", nil), file("source", body)) != nil { // or it is the whole file that is shared
		if err := copyContent(t.Context(), file("target", nil), file("source", body), int64(len(body))+1); !errors.Is(err, object.ErrSourceChanged) {
			t.Errorf("a source that is too short: err = %v, want ErrSourceChanged", err)
		}
	}
}
