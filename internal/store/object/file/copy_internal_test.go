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

// countdown is a context that ends after a number of calls of Err.
type countdown struct {
	context.Context //nolint:containedctx // a context
	left            int
}

func (e *countdown) Err() error {
	if e.left--; e.left < 0 {
		return context.Canceled
	}
	return nil
}

// A canceled copy leaves no files.
func TestCanceledCopy(t *testing.T) {
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
		_, err := s.Copy(&countdown{t.Context(), left}, r)
		if err == nil {
			break
		}
		ended++
		if !errors.Is(err, context.Canceled) {
			t.Errorf("after %d checks: err = %v, want Canceled", left, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "b", "c")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after %d checks a target exists, %v", left, err)
		}
		entries, err := os.ReadDir(filepath.Join(dir, TempDir))
		if err != nil || len(entries) != 0 {
			t.Errorf("after %d checks: left %v, %v", left, entries, err)
		}
	}
	if ended < 3 {
		t.Errorf("the context was checked %d times", ended)
	}
}

// modifier is a context that changes the source on a call of Err.
type modifier struct {
	context.Context //nolint:containedctx // a context
	left            int
	meddle          func()
}

func (m *modifier) Err() error {
	if m.left--; m.left == 0 {
		m.meddle()
	}
	return nil
}

// A source that is modified during the copy is not the requested version. It is checked
// before and after the copy.
func TestCopyOfChangingSource(t *testing.T) {
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
		then := time.Now().Add(-time.Hour) // so that a write changes the time
		if err := os.Chtimes(filepath.Join(dir, "a"), then, then); err != nil {
			t.Fatal(err)
		}
		source, err := s.Head(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx := &modifier{t.Context(), 4, func() {
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
			t.Errorf("%s: the context was not checked often enough to change the source", name)
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

// copyContent works without shared blocks, and detects a source that has become shorter.
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
	if clone(file("target", nil), file("source", body)) != nil { // else the whole file is shared
		if err := copyContent(t.Context(), file("target", nil), file("source", body), int64(len(body))+1); !errors.Is(err,
			object.ErrSourceChanged) {
			t.Errorf("a short source: err = %v, want ErrSourceChanged", err)
		}
	}
}
