package identity_test

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"testing"
	"unicode/utf8"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/test/allocated"
)

// FuzzIdentity checks a store with arbitrary content in its identity object. Check never
// changes the object. A cluster that accepts it has recorded its id and accepts it again,
// and no other cluster accepts it.
func FuzzIdentity(f *testing.F) {
	sound := `{"format_version":1,"id":"000102030405060708090a0b0c0d0e0f","cluster_id":"cluster-1"}`
	for _, body := range []string{
		"", "null", "{}", sound, sound + sound, sound + "\n", sound[:40], `{"format_version":2}`,
		`{"format_version":1,"id":"00","cluster_id":"cluster-1"}`,
		`{"format_version":1,"id":"000102030405060708090A0B0C0D0E0F","cluster_id":"cluster-1"}`,
		`{"ID":"000102030405060708090a0b0c0d0e0f","FORMAT_VERSION":1,"Cluster_Id":"\ud800"}`,
		sound + string(bytes.Repeat([]byte(" "), 5000)) + "x", string(bytes.Repeat([]byte("["), 5000)),
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		ctx := t.Context()
		s := memory.New(memory.Options{})
		if _, err := s.Put(ctx, identity.Key, body); err != nil {
			t.Fatal(err)
		}
		kv := metamemory.New(metamemory.Options{})
		var err error
		if took := allocated.Bytes(func() {
			err = identity.Check(ctx, kv, s, "cold", "cluster-1",
				rand.Reader)
		}); took > 256<<10 {
			t.Errorf("%d bytes took %d bytes of memory", len(body), took)
		}
		left, id := both(t, kv, s)
		if left != string(body) {
			t.Fatalf("%q became %q", body, left)
		}
		if err != nil {
			if id != "" {
				t.Errorf("%v, but id %q was recorded", err, id)
			}
			return
		}
		if raw, err := hex.DecodeString(id); err != nil || len(raw) != 16 || !utf8.ValidString(id) {
			t.Errorf("id %q was recorded", id)
		}
		if err := identity.Check(ctx, kv, s, "cold", "cluster-1", rand.Reader); err != nil {
			t.Errorf("repeated: %v", err)
		}
		if err := identity.Check(ctx, metamemory.New(metamemory.Options{}), s, "cold", "cluster-2", rand.Reader); err == nil {
			t.Error("another cluster accepts it")
		}
		if known, _, _, err := kv.Get(ctx, keys.Store("cold")); err != nil || string(known.Value) != id {
			t.Errorf("the id became %q, %v", known.Value, err)
		}
	})
}
