package catalog_test

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// FuzzName holds the rule of names to what it says in words. A name is one element of
// a key in either store, and so two names are never one key.
func FuzzName(f *testing.F) {
	for _, name := range []string{
		"", "a", "_", "-", ".", "..", "a.b-c_D9", "a\n", "a\nb", "a/b", "a b", "é", "a\xff", "\x00", "0", strings.Repeat("x",
			255), strings.Repeat("x", 256), "a-",
	} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		const first = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_"
		want := name != "" && len(name) <= 255 && strings.ContainsRune(first, rune(name[0])) && strings.Trim(name,
			first+".-") == ""
		err := catalog.CheckName("thing.name", name)
		if (err == nil) != want {
			t.Fatalf("%q: %v, want ok = %v", name, err, want)
		}
		if err != nil {
			invalid, ok := errors.AsType[*catalog.InvalidError](err)
			if !ok || !errors.Is(err, catalog.ErrInvalid) || invalid.Field != "thing.name" || !utf8.ValidString(err.Error()) {
				t.Errorf("%q: %v", name, err)
			}
			return
		}
		if object.CheckKey(name) != nil || strings.Count(keys.CollectionName(name, name), "/") != 4 {
			t.Errorf("%q is a name, and more than one element of a key", name)
		}
	})
}
