// Package objecttest is the conformance suite of [object.Store]. Every implementation runs
// it, so that users of the contract can be tested on any of them.
package objecttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Run checks the stores of open against the contract. Each subtest opens a new store, which
// must be empty and released by t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) object.Store) { RunExcept(t, open) }

// RunExcept is Run without the named subtests, for a store that is known to fail them.
func RunExcept(t *testing.T, open func(t *testing.T) object.Store, broken ...string) {
	seen := 0
	defer func() {
		if seen != len(broken) {
			t.Errorf("%q names %d subtests", broken, seen)
		}
	}()
	for _, c := range []struct {
		name string
		test func(*testing.T, object.Store)
	}{
		{"PutGetHead", testPutGetHead},
		{"Overwrite", testOverwrite},
		{"Create", testCreate},
		{"CreateRace", testCreateRace},
		{"Ranges", testRanges},
		{"Missing", testMissing},
		{"ReadWhileReplaced", testReadWhileReplaced},
		{"WholeWhileWritten", testWholeWhileWritten},
		{"ListOrder", testListOrder},
		{"ListPrefix", testListPrefix},
		{"ListFollowsWrites", testListFollowsWrites},
		{"ListStops", testListStops},
		{"ListMany", testListMany},
		{"Delete", testDelete},
		{"DeleteErrors", testDeleteErrors},
		{"PutRacesDelete", testPutRacesDelete},
		{"Copy", testCopy},
		{"CopyPinned", testCopyPinned},
		{"CopyAgain", testCopyAgain},
		{"CopyKeys", testCopyKeys},
		{"CopyConcurrently", testCopyConcurrently},
		{"CopyWhileReplaced", testCopyWhileReplaced},
		{"CopyCanceled", testCopyCanceled},
		{"CopyRefused", testCopyRefused},
		{"AbortUploads", testAbortUploads},
		{"ValidKeys", testValidKeys},
		{"InvalidKeys", testInvalidKeys},
		{"Canceled", testCanceled},
		{"Clock", testClock},
	} {
		if slices.Contains(broken, c.name) {
			seen++
			continue
		}
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

func testPutGetHead(t *testing.T, s object.Store) {
	for _, size := range []int{0, 1, 4096, 1<<20 + 7} {
		key := fmt.Sprintf("sizes/%d", size)
		body := pattern(size)
		sent := bytes.Clone(body)
		put, err := s.Put(t.Context(), key, sent)
		if err != nil {
			t.Fatalf("Put of %d bytes: %v", size, err)
		}
		clear(sent) // the store must not keep it
		checkInfo(t, put, key, size)

		got, info := get(t, s, key, 0, -1)
		if !bytes.Equal(got, body) {
			t.Errorf("%d bytes: Get returned %d bytes that differ", size, len(got))
		}
		checkSame(t, "Get", info, put)
		head, err := s.Head(t.Context(), key)
		if err != nil {
			t.Fatalf("Head: %v", err)
		}
		checkSame(t, "Head", head, put)
		for _, listed := range list(t, s, "sizes/") {
			if listed.Key == key {
				checkSame(t, "List", listed, put)
			}
		}
	}
	if n := len(list(t, s, "sizes/")); n != 4 {
		t.Errorf("List has %d objects, want 4", n)
	}
}

func testOverwrite(t *testing.T, s object.Store) {
	first := put(t, s, "a/b", "first")
	second := put(t, s, "a/b", "other")
	if first.ETag == second.ETag {
		t.Errorf("two contents have ETag %q", first.ETag)
	}
	checkSame(t, "List", one(t, list(t, s, "")), second)
	put(t, s, "a/b", "")
	if got, _ := get(t, s, "a/b", 0, -1); len(got) != 0 {
		t.Errorf("after an empty Put: %q", got)
	}
}

func testCreate(t *testing.T, s object.Store) {
	created, err := s.Create(t.Context(), "c/x", []byte("mine"))
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	checkInfo(t, created, "c/x", 4)
	if _, err := s.Create(t.Context(), "c/x", []byte("theirs")); !errors.Is(err, object.ErrExists) {
		t.Errorf("second Create: err = %v, want ErrExists", err)
	}
	got, info := get(t, s, "c/x", 0, -1)
	if string(got) != "mine" {
		t.Errorf("after a lost Create: %q, want mine", got)
	}
	checkSame(t, "Get", info, created)

	put(t, s, "c/x", "put")
	if _, err := s.Create(t.Context(), "c/x", nil); !errors.Is(err, object.ErrExists) {
		t.Errorf("Create over a Put: err = %v, want ErrExists", err)
	}
	remove(t, s, "c/x")
	if _, err := s.Create(t.Context(), "c/x", nil); err != nil {
		t.Errorf("Create after Delete: %v", err)
	}
}

func testCreateRace(t *testing.T, s object.Store) {
	const racers = 16
	for round := range 10 {
		key := fmt.Sprintf("race/%d/x", round)
		errs := make([]error, racers)
		var wg sync.WaitGroup
		for i := range racers {
			wg.Go(func() { _, errs[i] = s.Create(t.Context(), key, fmt.Append(nil, i)) })
		}
		wg.Wait()
		winner := -1
		for i, err := range errs {
			switch {
			case err == nil && winner >= 0:
				t.Fatalf("%s: both %d and %d succeeded", key, winner, i)
			case err == nil:
				winner = i
			case !errors.Is(err, object.ErrExists):
				t.Fatalf("%s: racer %d: %v", key, i, err)
			}
		}
		if got, _ := get(t, s, key, 0, -1); string(got) != fmt.Sprint(winner) {
			t.Fatalf("%s: content of racer %s, but %d succeeded", key, got, winner)
		}
	}
}

func testRanges(t *testing.T, s object.Store) {
	whole := put(t, s, "r", "0123456789")
	put(t, s, "empty", "")
	for _, c := range []struct {
		key            string
		offset, length int64
		want           string
	}{
		{"r", 0, -1, "0123456789"},
		{"r", 0, 10, "0123456789"},
		{"r", 0, 1 << 40, "0123456789"},
		{"r", 0, 1, "0"},
		{"r", 0, 0, ""},
		{"r", 3, 0, ""},
		{"r", 3, 4, "3456"},
		{"r", 3, -1, "3456789"},
		{"r", 3, -7, "3456789"},
		{"r", 9, 1, "9"},
		{"r", 9, 5, "9"},
		{"r", 10, -1, ""},
		{"r", 10, 5, ""},
		{"r", 11, -1, ""},
		{"r", 1 << 40, 5, ""},
		{"r", 1<<63 - 1, 1<<63 - 1, ""},
		{"r", 5, 1<<63 - 1, "56789"},
		{"empty", 0, -1, ""},
		{"empty", 0, 5, ""},
		{"empty", 5, -1, ""},
	} {
		got, info := get(t, s, c.key, c.offset, c.length)
		if string(got) != c.want {
			t.Errorf("Get %s, offset %d, length %d: %q, want %q", c.key, c.offset, c.length, got, c.want)
		}
		if c.key == "r" {
			checkSame(t, fmt.Sprintf("Get of %d bytes from %d", c.length, c.offset), info, whole)
		}
	}
	if r, _, err := s.Get(t.Context(), "r", -1, 1); err == nil {
		_ = r.Close()
		t.Error("Get from a negative offset: no error")
	}
}

func testMissing(t *testing.T, s object.Store) {
	put(t, s, "there/x", "x")
	for _, key := range []string{"missing", "there", "there/y", "there/x/z", "missing/x"} {
		if r, _, err := s.Get(t.Context(), key, 0, -1); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("Get %s: %v, err = %v, want ErrNotFound", key, r, err)
		}
		if r, _, err := s.Get(t.Context(), key, 100, 1); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("Get of a range of %s: %v, err = %v, want ErrNotFound", key, r, err)
		}
		if _, err := s.Head(t.Context(), key); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("Head %s: err = %v, want ErrNotFound", key, err)
		}
	}
}

// testReadWhileReplaced reads an object while it is replaced and deleted. The read may fail
// but never returns other content.
func testReadWhileReplaced(t *testing.T, s object.Store) {
	first := pattern(1 << 20)
	if _, err := s.Put(t.Context(), "a", first); err != nil {
		t.Fatal(err)
	}
	r, _, err := s.Get(t.Context(), "a", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, "a", strings.Repeat("z", 1<<20))
	remove(t, s, "a")
	got, err := io.ReadAll(r)
	if !bytes.HasPrefix(first, got) || (err == nil && len(got) != len(first)) {
		t.Errorf("read %d other bytes, err = %v", len(got), err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// testWholeWhileWritten reads one key during its replacement.
func testWholeWhileWritten(t *testing.T, s object.Store) {
	body := func(i int) []byte { return bytes.Repeat(fmt.Append(nil, i%10), 64<<10+i) }
	if _, err := s.Put(t.Context(), "w/x", body(0)); err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	var writers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			for i := range 20 {
				if _, err := s.Put(t.Context(), "w/x", body(2*i+w)); err != nil {
					t.Errorf("Put: %v", err)
				}
			}
		})
	}
	var readers sync.WaitGroup
	readers.Go(func() {
		for !done.Load() {
			got, info := get(t, s, "w/x", 0, -1)
			if i := len(got) - 64<<10; i < 0 || !bytes.Equal(got, body(i)) || info.Size != int64(len(got)) {
				t.Errorf("read %d bytes of an object of %d bytes with unwritten content", len(got), info.Size)
				return
			}
		}
	})
	writers.Wait()
	done.Store(true)
	readers.Wait()
}

func testListOrder(t *testing.T, s object.Store) {
	want := []string{
		"a!", "a-b", "a-b-/x", "a.b", "a/!", "a/b", "a/b!", "a/b-/c", "a/c/d/e", "a/c/d0", "a/c0", "a0", "aa/b", "b", "é",
		"\U0001f600",
	}
	if !slices.IsSorted(want) {
		t.Fatal("the keys of the test are out of order")
	}
	for _, i := range []int{7, 3, 15, 0, 9, 12, 1, 5, 14, 8, 2, 13, 4, 10, 6, 11} {
		put(t, s, want[i], want[i])
	}
	if diff := cmp.Diff(want, keys(list(t, s, ""))); diff != "" {
		t.Errorf("List (-want +got):\n%s", diff)
	}
	for _, info := range list(t, s, "") {
		checkInfo(t, info, info.Key, len(info.Key))
	}
}

func testListPrefix(t *testing.T, s object.Store) {
	for _, key := range []string{"a/1/x", "a/1/y/z", "a/10/x", "a/1-/x", "a/1x", "a/2", "b/1/x", "é/x", "e\u0301/y"} {
		put(t, s, key, "")
	}
	for _, c := range []struct {
		prefix string
		want   []string
	}{
		{"a/1/", []string{"a/1/x", "a/1/y/z"}},
		{"a/10/", []string{"a/10/x"}},
		{"a/", []string{"a/1-/x", "a/1/x", "a/1/y/z", "a/10/x", "a/1x", "a/2"}},
		{"a/2/", nil},    // an object, not a directory
		{"a/1x/y/", nil}, // below an object
		{"c/", nil},
		{"é/", []string{"é/x"}},
		{"e\u0301/", []string{"e\u0301/y"}}, // looks the same but differs
	} {
		if diff := cmp.Diff(c.want, keys(list(t, s, c.prefix))); diff != "" {
			t.Errorf("List %q (-want +got):\n%s", c.prefix, diff)
		}
	}
	for _, prefix := range []string{
		"a", "/", "a//", "../", "a/../", "./", "a/1", "a\x00/", "a\\/",
		strings.Repeat("x/", 600),
	} {
		n := 0
		for _, err := range s.List(t.Context(), prefix) {
			n++
			if !errors.Is(err, object.ErrInvalidKey) {
				t.Errorf("List %q: err = %v, want ErrInvalidKey", prefix, err)
			}
		}
		if n != 1 {
			t.Errorf("List %q yielded %d times, want one error", prefix, n)
		}
	}
}

func testListFollowsWrites(t *testing.T, s object.Store) {
	if got := list(t, s, ""); len(got) != 0 {
		t.Fatalf("a new store lists %v", got)
	}
	for i := range 20 {
		key := fmt.Sprintf("l/%02d/x", i)
		put(t, s, key, "x")
		if got := keys(list(t, s, "l/")); len(got) != i+1 || got[i] != key {
			t.Fatalf("after Put %s: %v", key, got)
		}
	}
	for i := range 20 {
		key := fmt.Sprintf("l/%02d/x", i)
		remove(t, s, key)
		if got := keys(list(t, s, "l/")); len(got) != 19-i || slices.Contains(got, key) {
			t.Fatalf("after Delete %s: %v", key, got)
		}
	}
	seq := s.List(t.Context(), "")
	for range 2 { // a sequence can be used again, and lists again
		for info, err := range seq {
			t.Errorf("%v, err = %v in an empty store", info, err)
		}
		put(t, s, "k", "")
		remove(t, s, "k")
	}
}

func testListStops(t *testing.T, s object.Store) {
	for i := range 10 {
		put(t, s, fmt.Sprintf("%d/x", i), "")
	}
	n := 0
	for _, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n == 3 {
			break
		}
	}
	if n != 3 {
		t.Errorf("stopped after %d, want 3", n)
	}
}

// testListMany lists more objects than a page of S3 has.
func testListMany(t *testing.T, s object.Store) {
	const n = 1100
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := w; i < n; i += 16 {
				if _, err := s.Put(t.Context(), fmt.Sprintf("m/%04d", i), nil); err != nil {
					t.Errorf("Put: %v", err)
				}
			}
		})
	}
	wg.Wait()
	got := keys(list(t, s, "m/"))
	for i, key := range got {
		if want := fmt.Sprintf("m/%04d", i); key != want {
			t.Fatalf("object %d is %s, want %s", i, key, want)
		}
	}
	if len(got) != n {
		t.Errorf("listed %d, want %d", len(got), n)
	}
	remove(t, s, got...) // more than the limit of one S3 request
	if left := list(t, s, ""); len(left) != 0 {
		t.Errorf("%d objects left after Delete", len(left))
	}
}

func testDelete(t *testing.T, s object.Store) {
	for _, key := range []string{"d/a", "d/b", "d/c/x", "e"} {
		put(t, s, key, key)
	}
	if err := s.Delete(t.Context()); err != nil {
		t.Errorf("Delete of nothing: %v", err)
	}
	remove(t, s, "d/a", "missing", "d/missing", "d/a/below-an-object", "d", "d/c", "d/a")
	if diff := cmp.Diff([]string{"d/b", "d/c/x", "e"}, keys(list(t, s, ""))); diff != "" {
		t.Errorf("after Delete (-want +got):\n%s", diff)
	}
	remove(t, s, "d/c/x", "d/b", "e")
	if left := list(t, s, ""); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	put(t, s, "d", "the name of a former directory")
	remove(t, s, "d")
	put(t, s, "e/x", "below the name of a former object")
}

func testDeleteErrors(t *testing.T, s object.Store) {
	put(t, s, "a", "")
	put(t, s, "b", "")
	err := s.Delete(t.Context(), "a", "../x", "missing", "y//z", "b")
	if !errors.Is(err, object.ErrInvalidKey) {
		t.Errorf("err = %v, want ErrInvalidKey", err)
	}
	if diff := cmp.Diff([]string{"../x", "y//z"}, failedKeys(err)); diff != "" {
		t.Errorf("keys named in the error (-want +got):\n%s", diff)
	}
	if left := keys(list(t, s, "")); len(left) != 0 {
		t.Errorf("left: %v; an error of one key must not affect the others", left)
	}
}

// testPutRacesDelete writes into directories that concurrent deletes empty.
func testPutRacesDelete(t *testing.T, s object.Store) {
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 25 {
				key := fmt.Sprintf("p/q/r/%d", w)
				if _, err := s.Put(t.Context(), key, fmt.Append(nil, i)); err != nil {
					t.Errorf("Put %s: %v", key, err)
					return
				}
				if got, _ := get(t, s, key, 0, -1); string(got) != fmt.Sprint(i) {
					t.Errorf("%s: %q, want %d", key, got, i)
				}
				if err := s.Delete(t.Context(), key); err != nil {
					t.Errorf("Delete %s: %v", key, err)
				}
			}
		})
	}
	wg.Wait()
	if left := list(t, s, ""); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func testValidKeys(t *testing.T, s object.Store) {
	valid := []string{
		"a", "...", "x/..b", ".hidden/x", "-", "~", "a b", " lead", "trail ", "a:b", "a?b#c%2e%2e", "%2e%2e/y", "*",
		"a&b=c+d", "'\"<>|",
		"UPPER", "upper", "日本語/文字", "é", "e\u0301", "\u202eabc", "zero\u200bwidth", "\U0001f600/\U0001f680",
		strings.Repeat("k", 255), strings.Repeat("0123456789abcde/", 63) + strings.Repeat("z", 16),
	}
	if n := len(valid[len(valid)-1]); n != object.MaxKeyBytes {
		t.Fatalf("the longest key has %d bytes", n)
	}
	slices.Sort(valid)
	for _, key := range valid {
		put(t, s, key, key)
	}
	for _, key := range valid {
		if got, info := get(t, s, key, 0, -1); string(got) != key || info.Key != key {
			t.Errorf("%q has content %q and key %q", key, got, info.Key)
		}
	}
	if diff := cmp.Diff(valid, keys(list(t, s, ""))); diff != "" {
		t.Errorf("List (-want +got):\n%s", diff)
	}
	remove(t, s, valid...)
	if left := list(t, s, ""); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// InvalidKeys returns keys that every store must refuse.
func InvalidKeys() []string {
	return []string{
		"", "/", "/etc/passwd", "a/", "a//b", "//a", ".", "..", "./a", "a/.", "../a", "a/../b", "a/..", "a/./b",
		"a\x00b", "a\nb", "a\x7fb", "a\\b", "..\\a", "\xff", "a/\xc3(", "\xed\xa0\x80",
		strings.Repeat("0123456789abcde/", 64) + "z", strings.Repeat("x", object.MaxKeyBytes+1),
	}
}

func testInvalidKeys(t *testing.T, s object.Store) {
	for _, key := range InvalidKeys() {
		calls := map[string]func() error{
			"Put":    func() error { _, err := s.Put(t.Context(), key, nil); return err },
			"Create": func() error { _, err := s.Create(t.Context(), key, nil); return err },
			"Get":    func() error { _, _, err := s.Get(t.Context(), key, 0, -1); return err },
			"Head":   func() error { _, err := s.Head(t.Context(), key); return err },
			"Delete": func() error { return s.Delete(t.Context(), key) },
			"Copy": func() error {
				_, err := s.Copy(t.Context(), object.CopyRequest{From: key, To: "b", SourceETag: "e"})
				return err
			},
			"CopyTo": func() error {
				_, err := s.Copy(t.Context(), object.CopyRequest{From: "b", To: key, SourceETag: "e"})
				return err
			},
		}
		for name, call := range calls {
			if err := call(); !errors.Is(err, object.ErrInvalidKey) {
				t.Errorf("%s %.40q: err = %v, want ErrInvalidKey", name, key, err)
			}
		}
	}
	if left := list(t, s, ""); len(left) != 0 {
		t.Errorf("invalid keys left objects: %v", left)
	}
}

func testCanceled(t *testing.T, s object.Store) {
	kept := put(t, s, "a", "kept")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	calls := map[string]func() error{
		"Put":    func() error { _, err := s.Put(ctx, "a", nil); return err },
		"Create": func() error { _, err := s.Create(ctx, "b", nil); return err },
		"Get":    func() error { _, _, err := s.Get(ctx, "a", 0, -1); return err },
		"Head":   func() error { _, err := s.Head(ctx, "a"); return err },
		"Delete": func() error { return s.Delete(ctx, "a") },
		"Now":    func() error { _, err := s.Now(ctx); return err },
		"Copy":   func() error { _, err := s.Copy(ctx, request(kept, "b")); return err },
		"Abort":  func() error { _, err := s.AbortUploads(ctx, "", time.Time{}); return err },
		"Oldest": func() error { _, err := s.OldestUpload(ctx, ""); return err },
		"List": func() error {
			for info, err := range s.List(ctx, "") {
				if err != nil {
					return err
				}
				t.Errorf("List yielded %v", info)
			}
			return nil
		},
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: err = %v, want context.Canceled", name, err)
		}
	}
	if diff := cmp.Diff([]string{"a", "b"}, failedKeys(s.Delete(ctx, "a", "b"))); diff != "" {
		t.Errorf("keys named by a canceled Delete (-want +got):\n%s", diff)
	}
	if got, _ := get(t, s, "a", 0, -1); string(got) != "kept" {
		t.Errorf("after canceled writes: %q", got)
	}

	for _, err := range s.List(ctx, "a/") { // also for an empty result
		if !errors.Is(err, context.Canceled) {
			t.Errorf("List of nothing: err = %v", err)
		}
	}

	put(t, s, "b", "")
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	var last error
	for _, err := range s.List(ctx, "") {
		if err == nil {
			cancel() // during the list
		}
		last = err
	}
	if last != nil && !errors.Is(last, context.Canceled) {
		t.Errorf("List canceled during the list: %v", last)
	}
}

func testClock(t *testing.T, s object.Store) {
	before, err := s.Now(t.Context())
	if err != nil {
		t.Fatalf("Now: %v", err)
	}
	info := put(t, s, "a", "")
	after, err := s.Now(t.Context())
	if err != nil {
		t.Fatalf("Now: %v", err)
	}
	// Now and ModTime each have a tolerance of a second.
	if info.ModTime.Before(before.Add(-time.Second)) || info.ModTime.After(after.Add(time.Second)) {
		t.Errorf("written at %v, by the store's clock between %v and %v", info.ModTime, before, after)
	}
	if got := list(t, s, ""); len(got) != 1 {
		t.Errorf("reading the clock left objects: %v", got)
	}
}

func pattern(size int) []byte {
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return body
}

func put(t *testing.T, s object.Store, key, body string) object.Info {
	t.Helper()
	info, err := s.Put(t.Context(), key, []byte(body))
	if err != nil {
		t.Fatalf("Put %q: %v", key, err)
	}
	return info
}

func get(t *testing.T, s object.Store, key string, offset, length int64) ([]byte, object.Info) {
	t.Helper()
	r, info, err := s.Get(t.Context(), key, offset, length)
	if err != nil {
		t.Errorf("Get %q, offset %d, length %d: %v", key, offset, length, err)
		return nil, info
	}
	body, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Errorf("read %q: %v", key, err)
	}
	return body, info
}

func list(t *testing.T, s object.Store, prefix string) []object.Info {
	t.Helper()
	var infos []object.Info
	for info, err := range s.List(t.Context(), prefix) {
		if err != nil {
			t.Fatalf("List %q: %v", prefix, err)
		}
		infos = append(infos, info)
	}
	return infos
}

func remove(t *testing.T, s object.Store, keys ...string) {
	t.Helper()
	if err := s.Delete(t.Context(), keys...); err != nil {
		t.Fatalf("Delete: %v", err)
	}
}

func keys(infos []object.Info) []string {
	var keys []string
	for _, info := range infos {
		keys = append(keys, info.Key)
	}
	return keys
}

func one(t *testing.T, infos []object.Info) object.Info {
	t.Helper()
	if len(infos) != 1 {
		t.Fatalf("%d objects, want 1", len(infos))
	}
	return infos[0]
}

func checkInfo(t *testing.T, info object.Info, key string, size int) {
	t.Helper()
	if info.Key != key || info.Size != int64(size) || info.ETag == "" || strings.Contains(info.ETag, `"`) {
		t.Errorf("info %+v; want key %s, %d bytes and an unquoted ETag", info, key, size)
	}
}

// checkSame compares the Info of two calls for one object. The time in the result of a write
// may be approximate.
func checkSame(t *testing.T, what string, got, want object.Info) {
	t.Helper()
	if got.Key != want.Key || got.Size != want.Size || got.ETag != want.ETag {
		t.Errorf("%s returned %+v, the write %+v", what, got, want)
	}
	if d := got.ModTime.Sub(want.ModTime).Abs(); d > 2*time.Second {
		t.Errorf("%s returned modification time %v, the write %v", what, got.ModTime, want.ModTime)
	}
}

// failedKeys returns the keys of the delete errors that err joins, sorted.
func failedKeys(err error) []string {
	var keys []string
	switch e := err.(type) { //nolint:errorlint // walks the error tree
	case nil:
	case *object.DeleteError:
		keys = append(keys, e.Key)
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			keys = append(keys, failedKeys(err)...)
		}
	case interface{ Unwrap() error }:
		keys = failedKeys(e.Unwrap())
	}
	slices.Sort(keys)
	return keys
}
