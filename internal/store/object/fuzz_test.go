package object_test

import (
	"errors"
	"io/fs"
	"path"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
)

// FuzzKey compares CheckKey with the two path definitions of the standard library,
// CheckPrefix with CheckKey, and a store with both.
func FuzzKey(f *testing.F) {
	for _, key := range []string{
		"", "a", "a/b", "/a", "a/", "a//b", ".", "..", "a/.", "a/../b", "...", "a/...", ".a", "a\\b", "a\x00b", "a\x7f",
		"a\u0085", "\xff", "é/ü",
		"C:", "a b", " ", "a/ ", "~", "\u2028", "\u202e", strings.Repeat("a", object.MaxKeyBytes),
		strings.Repeat("a", object.MaxKeyBytes+1),
		strings.Repeat("é", object.MaxKeyBytes/2) + "/", strings.Repeat("a/", object.MaxKeyBytes/2),
	} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		err := object.CheckKey(key)
		if err != nil && !errors.Is(err, object.ErrInvalidKey) {
			t.Errorf("CheckKey(%q): %v", key, err)
		}
		if err != nil && !utf8.ValidString(err.Error()) {
			t.Errorf("CheckKey(%q): the error is not UTF-8", key)
		}
		plain := !strings.ContainsFunc(key, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' })
		want := plain && len(key) <= object.MaxKeyBytes && fs.ValidPath(key) && key != "."
		if (err == nil) != want {
			t.Fatalf("CheckKey(%q) = %v, want ok = %v", key, err, want)
		}
		if err == nil && (path.Clean(key) != key || path.IsAbs(key)) {
			t.Errorf("%q is a valid key but not a canonical path", key)
		}

		if err := object.CheckPrefix(key + "/"); (err == nil) != want {
			t.Errorf("CheckPrefix(%q) = %v, want ok = %v", key+"/", err, want)
		}
		prefixErr := object.CheckPrefix(key)
		if trimmed, ok := strings.CutSuffix(key, "/"); prefixErr == nil && key != "" &&
			(!ok || object.CheckKey(trimmed) != nil) {
			t.Errorf("CheckPrefix(%q) = nil", key)
		}
		if prefixErr != nil && !errors.Is(prefixErr, object.ErrInvalidKey) {
			t.Errorf("CheckPrefix(%q): %v", key, prefixErr)
		}
		checkStore(t, key, want, prefixErr == nil)
	})
}

// checkStore checks that a store accepts valid keys and prefixes only.
func checkStore(t *testing.T, key string, isKey, isPrefix bool) {
	t.Helper()
	ctx := t.Context()
	s := memory.New(memory.Options{})
	_, err := s.Put(ctx, key, []byte("x"))
	if (err == nil) != isKey || err != nil && !errors.Is(err, object.ErrInvalidKey) {
		t.Errorf("Put(%q): %v", key, err)
	}
	if _, err := s.Head(ctx, key); (err == nil) != isKey {
		t.Errorf("Head(%q): %v", key, err)
	}
	for info, err := range s.List(ctx, key) {
		if (err == nil) != isPrefix {
			t.Errorf("List(%q): %v", key, err)
		}
		if err == nil && (!isKey && key != "" || !strings.HasPrefix(info.Key, key)) {
			t.Errorf("List(%q) has %q", key, info.Key)
		}
	}
}
