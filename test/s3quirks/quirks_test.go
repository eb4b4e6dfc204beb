//go:build !short && linux

package s3quirks_test

import (
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3quirks"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// open returns a store with the objects a/1, a/2 and b/1 on a server with the quirk.
func open(t *testing.T, quirk s3quirks.Quirk) object.Store {
	t.Helper()
	o := s3test.Bucket(t)
	plain := s3test.Open(t, o)
	for _, key := range []string{"a/1", "a/2", "b/1"} {
		if _, err := plain.Put(t.Context(), key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	o.Endpoint, o.MaxAttempts = s3quirks.New(t, o.Endpoint, quirk).URL(), 1
	return s3test.Open(t, o)
}

func read(t *testing.T, s object.Store, key string) error {
	t.Helper()
	_, err := object.ReadAll(t.Context(), s, key, 100)
	return err
}

// TestRefuse rejects one read of one key, after one that passes.
func TestRefuse(t *testing.T) {
	s := open(t, s3quirks.Refuse(s3quirks.Match{
		Ops: []s3fault.Op{s3fault.GetObject}, Key: regexp.MustCompile(`/1$`), Skip: 1, Times: 1,
	}, http.StatusServiceUnavailable, "SlowDown", "slow down", http.Header{"Retry-After": {"1"}}))
	for n, key := range []string{"a/1", "a/2", "b/1", "a/2", "a/1"} {
		if err := read(t, s, key); errors.Is(err, object.ErrUnavailable) != (n == 2) || err != nil && n != 2 {
			t.Errorf("read %d, of %s: %v", n, key, err)
		}
	}
}

// TestArchived reads and copies objects of an archive class.
func TestArchived(t *testing.T) {
	s := open(t, s3quirks.Archived(regexp.MustCompile("a/1")))
	info, err := s.Head(t.Context(), "a/1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Copy(t.Context(), object.CopyRequest{From: "a/1", To: "c", SourceETag: info.ETag, Size: info.Size})
	for what, err := range map[string]error{"read": read(t, s, "a/1"), "copy": err} {
		if !errors.Is(err, object.ErrDenied) || !strings.Contains(err.Error(), "restore it first") {
			t.Errorf("%s: %v, want ErrDenied with the remedy", what, err)
		}
	}
	if err := read(t, s, "b/1"); err != nil {
		t.Error(err)
	}
}

// TestEmptyLists lists on a server that hides a prefix.
func TestEmptyLists(t *testing.T) {
	s := open(t, s3quirks.EmptyLists(regexp.MustCompile("a/$")))
	for prefix, want := range map[string][]string{"a/": nil, "b/": {"b/1"}, "": {"a/1", "a/2", "b/1"}} {
		var got []string
		for info, err := range s.List(t.Context(), prefix) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, info.Key)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", prefix, got, want)
		}
	}
}
