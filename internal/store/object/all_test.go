package object_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

func TestReadAll(t *testing.T) {
	for name, c := range map[string]struct {
		key   string
		limit int64
		fault object.Fault
		want  string
		err   error
	}{
		"shorter":     {"five", 10, object.FaultNone, "12345", nil},
		"as long":     {"five", 5, object.FaultNone, "12345", nil},
		"longer":      {"five", 4, object.FaultNone, "12345", nil},
		"much longer": {"five", 2, object.FaultNone, "123", nil},
		"empty":       {"empty", 0, object.FaultNone, "", nil},
		"no object":   {"none", 5, object.FaultNone, "", object.ErrNotFound},
		"no reply":    {"five", 5, object.FaultBefore, "", object.ErrUnavailable},
		"damaged":     {"five", 5, object.FaultFlip, "12245", nil},
		"no key":      {"../x", 5, object.FaultNone, "", object.ErrInvalidKey},
	} {
		t.Run(name, func(t *testing.T) {
			s, inner := newFaulty()
			for key, body := range map[string]string{"five": "12345", "empty": ""} {
				if _, err := inner.Put(t.Context(), key, []byte(body)); err != nil {
					t.Fatal(err)
				}
			}
			s.FailNth(object.OpGet, 0, c.fault)
			got, err := object.ReadAll(t.Context(), s, c.key, c.limit)
			if !errors.Is(err, c.err) {
				t.Errorf("err = %v, want %v", err, c.err)
			}
			if diff := cmp.Diff(c.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestReadVerified reads an object whose answers have faults. The number of requests is exact.
func TestReadVerified(t *testing.T) {
	errContent := errors.New("other content")
	none, flip, truncate := object.FaultNone, object.FaultFlip, object.FaultTruncate
	before, denied := object.FaultBefore, object.FaultDenied
	unavailable := object.ErrUnavailable
	for name, c := range map[string]struct {
		body   string
		faults []object.Fault // of the reads, in order
		gets   int
		checks []string // contents that check gets
		err    error
	}{
		"intact":                  {"12345", nil, 1, []string{"12345"}, nil},
		"altered once":            {"12345", []object.Fault{flip}, 2, []string{"12245", "12345"}, nil},
		"altered twice":           {"12345", []object.Fault{flip, flip}, 2, []string{"12245", "12245"}, errContent},
		"truncated once":          {"12345", []object.Fault{truncate}, 2, []string{"12", "12345"}, nil},
		"truncated twice":         {"12345", []object.Fault{truncate, truncate}, 2, []string{"12", "12"}, errContent},
		"altered, truncated":      {"12345", []object.Fault{flip, truncate}, 2, []string{"12245", "12"}, errContent},
		"other content":           {"54321", nil, 2, []string{"54321", "54321"}, errContent},
		"shorter":                 {"123", nil, 2, []string{"123", "123"}, errContent},
		"empty":                   {"", nil, 2, []string{"", ""}, errContent},
		"longer":                  {"123456", nil, 2, []string{"123456", "123456"}, errContent},
		"much longer":             {"12345678", nil, 2, []string{"123456", "123456"}, errContent},
		"missing":                 {"none", nil, 1, nil, object.ErrNotFound},
		"no answer":               {"12345", []object.Fault{before}, 1, nil, unavailable},
		"answer lost":             {"12345", []object.Fault{object.FaultAfter}, 1, nil, unavailable},
		"altered, then no answer": {"12345", []object.Fault{flip, before}, 2, []string{"12245"}, unavailable},
		"altered, denied":         {"12345", []object.Fault{flip, denied}, 2, []string{"12245"}, object.ErrDenied},
		"one read suffices":       {"12345", []object.Fault{none, flip}, 1, []string{"12345"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s, inner := newFaulty()
			if c.body != "none" {
				if _, err := inner.Put(t.Context(), "key", []byte(c.body)); err != nil {
					t.Fatal(err)
				}
			}
			s.Plan(func(call object.Call) object.Fault {
				if call.N < len(c.faults) {
					return c.faults[call.N]
				}
				return none
			})
			var checks []string
			got, err := object.ReadVerified(t.Context(), s, "key", 5, func(data []byte) error {
				checks = append(checks, string(data))
				if string(data) != "12345" {
					return errContent
				}
				return nil
			})
			if !errors.Is(err, c.err) {
				t.Errorf("err = %v, want %v", err, c.err)
			}
			if err == nil != (string(got) == "12345") || err != nil && got != nil {
				t.Errorf("got %q with err = %v", got, err)
			}
			if errors.Is(err, errContent) && err.Error() != errContent.Error() {
				t.Errorf("the error of check is changed: %v", err)
			}
			if diff := cmp.Diff(c.checks, checks); diff != "" {
				t.Errorf("checks (-want +got):\n%s", diff)
			}
			if s.Calls("") != c.gets || s.Calls(object.OpGet) != c.gets {
				t.Errorf("%d reads and %d calls, want %d", s.Calls(object.OpGet), s.Calls(""), c.gets)
			}
		})
	}
}

// TestReadVerifiedDeleted deletes the object between the two reads.
func TestReadVerifiedDeleted(t *testing.T) {
	s, inner := newFaulty()
	if _, err := inner.Put(t.Context(), "key", []byte("12345")); err != nil {
		t.Fatal(err)
	}
	_, err := object.ReadVerified(t.Context(), s, "key", 5, func([]byte) error {
		if err := inner.Delete(t.Context(), "key"); err != nil {
			t.Error(err)
		}
		return errors.New("other content")
	})
	if !errors.Is(err, object.ErrNotFound) || s.Calls("") != 2 {
		t.Errorf("err = %v after %d calls, want %v after 2", err, s.Calls(""), object.ErrNotFound)
	}
}

func TestDeletePrefix(t *testing.T) {
	const many = 1200 // three batches
	for name, c := range map[string]struct {
		prefix string
		op     object.Op // that fails; empty: none
		nth    int
		fault  object.Fault
		err    error
		left   int // of those under a/
	}{
		"all":                 {"a/", "", 0, object.FaultNone, nil, 0},
		"nothing":             {"none/", "", 0, object.FaultNone, nil, many},
		"no prefix":           {"a", "", 0, object.FaultNone, object.ErrInvalidKey, many},
		"no list":             {"a/", object.OpList, 0, object.FaultBefore, object.ErrUnavailable, many},
		"the list ends early": {"a/", object.OpList, 0, object.FaultAfter, object.ErrUnavailable, 200},
		"first delete":        {"a/", object.OpDelete, 0, object.FaultBefore, object.ErrUnavailable, many},
		"second delete":       {"a/", object.OpDelete, 1, object.FaultBefore, object.ErrUnavailable, 700},
		"no reply":            {"a/", object.OpDelete, 1, object.FaultAfter, object.ErrUnavailable, 200},
		"last delete":         {"a/", object.OpDelete, 2, object.FaultBefore, object.ErrUnavailable, 200},
	} {
		t.Run(name, func(t *testing.T) {
			s, inner := newFaulty()
			under := func() (n int) {
				t.Helper()
				for _, err := range inner.List(t.Context(), "a/") {
					if err != nil {
						t.Fatal(err)
					}
					n++
				}
				return n
			}
			for i := range many {
				if _, err := inner.Put(t.Context(), fmt.Sprintf("a/%d/x", i), nil); err != nil {
					t.Fatal(err)
				}
			}
			for _, key := range []string{"ab", "b/a"} {
				if _, err := inner.Put(t.Context(), key, nil); err != nil {
					t.Fatal(err)
				}
			}
			s.FailNth(c.op, c.nth, c.fault)
			if err := object.DeletePrefix(t.Context(), s, c.prefix); !errors.Is(err, c.err) {
				t.Errorf("err = %v, want %v", err, c.err)
			}
			if n := under(); n != c.left {
				t.Errorf("%d remain, want %d", n, c.left)
			}
			if c.op != "" {
				if s.Fired() != 1 {
					t.Errorf("%d faults fired", s.Fired())
				}
				s.Plan(nil) // a repeat continues
				if err := object.DeletePrefix(t.Context(), s, c.prefix); err != nil || under() != 0 {
					t.Errorf("repeated: err = %v, %d are left", err, under())
				}
			}
			var others []string
			for info, err := range inner.List(t.Context(), "") {
				if err != nil {
					t.Fatal(err)
				}
				if !strings.HasPrefix(info.Key, "a/") {
					others = append(others, info.Key)
				}
			}
			if diff := cmp.Diff([]string{"ab", "b/a"}, others); diff != "" {
				t.Errorf("others (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("ended context", func(t *testing.T) {
		s, _ := newFaulty()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := object.DeletePrefix(ctx, s, "a/"); !errors.Is(err, context.Canceled) {
			t.Errorf("err = %v, want %v", err, context.Canceled)
		}
	})
}
