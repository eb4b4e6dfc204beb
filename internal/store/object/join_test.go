package object_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

func TestJoin(t *testing.T) {
	if err := object.Join(nil, nil); err != nil {
		t.Errorf("of none: %v", err)
	}
	if err := object.Join(nil, io.EOF, numbered(1)); err.Error() != "EOF\nfs 1" {
		t.Errorf("of two: %q", err)
	}
	var errs []error
	for i := range 1000 {
		errs = append(errs, numbered(i))
	}
	errs = append(errs, &object.DeleteError{Key: "k", Err: io.EOF}, fmt.Errorf("%s: %w", strings.Repeat("ä", 5000),
		io.ErrNoProgress))
	err := object.Join(errs...)
	for range 3 { // also after another Join
		if text := err.Error(); len(text) > 8*(512+4)+40 || !strings.Contains(text, "fs 0") {
			t.Errorf("%d bytes: %q", len(text), text)
		}
		if d, ok := errors.AsType[*object.DeleteError](err); !ok || d.Key != "k" || !errors.Is(err, io.EOF) ||
			!errors.Is(err, io.ErrNoProgress) {
			t.Error("not all errors are found")
		}
		err = object.Join(err, errors.Join(errs...), err)
	}
	if text := object.Join(errs...).Error(); !strings.HasSuffix(text, "\nand 994 errors more") {
		t.Errorf("%q", text)
	}
	if text := object.Join(errs[1001]).Error(); strings.ToValidUTF8(text, "?") != text || len(text) > 520 {
		t.Errorf("%q", text)
	}
}

type numbered int

func (n numbered) Error() string { return fmt.Sprint("fs ", int(n)) }
