//go:build !short && linux

package s3_test

import (
	"errors"
	"sync/atomic"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// TestKeysReload replaces the secret of an open store: a refused request continues with the
// new one at once.
func TestKeysReload(t *testing.T) {
	o := s3test.Bucket(t)
	right := s3.Keys{AccessKeyID: o.AccessKeyID, SecretAccessKey: o.SecretAccessKey}
	var keys atomic.Pointer[s3.Keys]
	keys.Store(&s3.Keys{AccessKeyID: right.AccessKeyID, SecretAccessKey: "one-of-yesterday"})
	o.AccessKeyID, o.SecretAccessKey = "", ""
	o.ReadKeys = func() (s3.Keys, error) { return *keys.Load(), nil }
	store := s3test.Open(t, o)
	keys.Store(&right)
	if _, err := store.Put(t.Context(), "a", []byte("x")); err != nil {
		t.Errorf("Put with a secret that was replaced: %v", err)
	}
}

// TestKeysReloadAfterDenial replaces the keys of an open store that denies access to the old
// ones.
func TestKeysReloadAfterDenial(t *testing.T) {
	o := s3test.Bucket(t)
	proxy := s3fault.New(t, o.Endpoint)
	right := s3.Keys{AccessKeyID: o.AccessKeyID, SecretAccessKey: o.SecretAccessKey}
	var keys atomic.Pointer[s3.Keys]
	keys.Store(&s3.Keys{AccessKeyID: right.AccessKeyID, SecretAccessKey: "one-of-yesterday"})
	o.Endpoint, o.AccessKeyID, o.SecretAccessKey = proxy.URL(), "", ""
	o.ReadKeys = func() (s3.Keys, error) { return *keys.Load(), nil }
	store := s3test.Open(t, o)
	keys.Store(&right)
	proxy.Plan(s3fault.Rule{Op: s3fault.PutObject, Action: s3fault.Status(403, "AccessDenied")})
	if _, err := store.Put(t.Context(), "a", []byte("x")); err != nil {
		t.Errorf("Put with a key that was replaced: %v", err)
	}
	proxy.MustHaveFired(t)
	// The next refusal follows too soon for another reload, and is returned.
	proxy.Plan(s3fault.Rule{Op: s3fault.PutObject, Action: s3fault.Status(403, "AccessDenied")})
	if _, err := store.Put(t.Context(), "a", []byte("x")); !errors.Is(err, object.ErrDenied) || !object.IsPassing(err) {
		t.Errorf("Put: %v", err)
	}
}

// TestRefusedKeysFail shows that a store does not retry forever, and that it keeps the last
// keys if a reload fails.
func TestRefusedKeysFail(t *testing.T) {
	o := s3test.Bucket(t)
	right := s3.Keys{AccessKeyID: o.AccessKeyID, SecretAccessKey: o.SecretAccessKey}
	proxy := s3fault.New(t, o.Endpoint)
	o.Endpoint, o.AccessKeyID, o.SecretAccessKey = proxy.URL(), "", ""
	unreadable := false
	o.ReadKeys = func() (s3.Keys, error) {
		if unreadable {
			return s3.Keys{}, errors.New("the file is missing")
		}
		return right, nil
	}
	store := s3test.Open(t, o)
	unreadable = true
	for _, code := range []string{"ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"} {
		proxy.Plan(s3fault.Rule{Op: s3fault.PutObject, Times: -1, Action: s3fault.Status(403, code)})
		if _, err := store.Put(t.Context(), "a", []byte("x")); !errors.Is(err, object.ErrDenied) {
			t.Errorf("%s: err = %v, want ErrDenied", code, err)
		}
		proxy.MustHaveFired(t)
		proxy.Plan()
		if _, err := store.Put(t.Context(), "a", []byte("x")); err != nil {
			t.Errorf("after %s: %v", code, err)
		}
	}
}
