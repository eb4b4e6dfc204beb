package objecttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// request returns the request to copy the current version of an object, in parts if it is
// larger than a part.
func request(source object.Info, to string) object.CopyRequest {
	return object.CopyRequest{
		From: source.Key, To: to, SourceETag: source.ETag, Size: source.Size,
		Parts: object.CopyParts{Threshold: object.MinPartSize, PartSize: object.MinPartSize},
	}
}

func copied(t *testing.T, s object.Store, r object.CopyRequest) object.Info {
	t.Helper()
	info, err := s.Copy(t.Context(), r)
	if err != nil {
		t.Fatalf("Copy %q to %q: %v", r.From, r.To, err)
	}
	return info
}

func putBody(t *testing.T, s object.Store, key string, body []byte) object.Info {
	t.Helper()
	info, err := s.Put(t.Context(), key, body)
	if err != nil {
		t.Fatalf("Put %q: %v", key, err)
	}
	return info
}

// wantNoUploads checks that no upload is open.
func wantNoUploads(t *testing.T, s object.Store) {
	t.Helper()
	if n, err := s.AbortUploads(t.Context(), "", time.Time{}); err != nil || n != 0 {
		t.Errorf("%d uploads are open, %v", n, err)
	}
}

func testCopy(t *testing.T, s object.Store) {
	for _, size := range []int{
		0, 1, 64 << 10, object.MinPartSize, object.MinPartSize + 1, 2 * object.MinPartSize,
		11 << 20,
	} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			body := pattern(size)
			source := putBody(t, s, fmt.Sprintf("from/%d", size), body)
			to := fmt.Sprintf("to/%d/x", size)
			info := copied(t, s, request(source, to))
			checkInfo(t, info, to, size)
			if d := info.ModTime.Sub(source.ModTime); d < -2*time.Second || d > time.Minute {
				t.Errorf("copied at %v, written at %v", info.ModTime, source.ModTime)
			}

			got, read := get(t, s, to, 0, -1)
			if !bytes.Equal(got, body) {
				t.Errorf("the copy has %d bytes that differ from its source", len(got))
			}
			checkSame(t, "Get", read, info)
			checkSame(t, "List", one(t, list(t, s, fmt.Sprintf("to/%d/", size))), info)
			head, err := s.Head(t.Context(), to)
			if err != nil {
				t.Fatalf("Head: %v", err)
			}
			checkSame(t, "Head", head, info)
			from, err := s.Head(t.Context(), source.Key)
			if err != nil {
				t.Fatalf("Head: %v", err)
			}
			checkSame(t, "Head of the source", from, source)
			// A copy in one request has no proof if the source has an ETag of parts.
			provable := size > object.MinPartSize || !strings.Contains(source.ETag, "-")
			if provable && contentETags(t, s) && !object.ProvedEqual(from, head) {
				t.Errorf("the copy is not proved equal: %+v of %+v", head, from)
			}
			other := from
			other.ETag, other.Checksum = "0123456789abcdef0123456789abcdef", ""
			if object.ProvedEqual(other, head) {
				t.Errorf("a copy of %+v is proved equal to another: %+v", from, head)
			}
			wantOnlyFromHead(t, read, info, source, one(t, list(t, s, fmt.Sprintf("to/%d/", size))))
		})
	}
	wantNoUploads(t, s)
}

// wantOnlyFromHead checks that the fields of Head are empty.
func wantOnlyFromHead(t *testing.T, infos ...object.Info) {
	t.Helper()
	for _, info := range infos {
		if info.Checksum != "" || info.SourceETag != "" || info.OpaqueETag {
			t.Errorf("%+v has fields that only Head returns", info)
		}
	}
}

// contentETags reports whether the store derives ETags from the content.
func contentETags(t *testing.T, s object.Store) bool {
	t.Helper()
	first := put(t, s, "etag/x", "same")
	return put(t, s, "etag/x", "same").ETag == first.ETag
}

func testCopyPinned(t *testing.T, s object.Store) {
	for name, size := range map[string]int{"whole": 10, "parts": object.MinPartSize + 10} {
		t.Run(name, func(t *testing.T) {
			old := putBody(t, s, name+"/from", bytes.Repeat([]byte{'o'}, size))
			source := putBody(t, s, name+"/from", bytes.Repeat([]byte{'n'}, size))
			to := name + "/to/x"
			if info, err := s.Copy(t.Context(), request(old, to)); !errors.Is(err, object.ErrSourceChanged) ||
				!strings.Contains(err.Error(), old.Key) {
				t.Errorf("a replaced source: %+v, err = %v, want ErrSourceChanged", info, err)
			}
			remove(t, s, name+"/gone")
			missing := source
			missing.Key = name + "/gone"
			info, err := s.Copy(t.Context(), request(missing, to))
			if !errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrSourceChanged) ||
				!strings.Contains(err.Error(), missing.Key) {
				t.Errorf("a missing source: %+v, err = %v, want ErrNotFound", info, err)
			}
			if size > object.MinPartSize {
				for _, by := range []int64{-1, 1} {
					wrong := source
					wrong.Size += by
					if info, err := s.Copy(t.Context(), request(wrong, to)); !errors.Is(err, object.ErrSourceChanged) {
						t.Errorf("a source of %d more bytes: %+v, err = %v, want ErrSourceChanged", by, info, err)
					}
				}
			}
			if left := list(t, s, name+"/to/"); len(left) != 0 {
				t.Errorf("refused copies left %v", left)
			}

			target := put(t, s, to, "there before")
			if _, err := s.Copy(t.Context(), request(old, to)); !errors.Is(err, object.ErrSourceChanged) {
				t.Errorf("over another object: err = %v, want ErrSourceChanged", err)
			}
			if got, info := get(t, s, to, 0, -1); string(got) != "there before" || info.ETag != target.ETag {
				t.Errorf("a refused copy changed its target to %d bytes", len(got))
			}
			copied(t, s, request(source, to))
			if got, _ := get(t, s, to, 0, -1); !bytes.Equal(got, bytes.Repeat([]byte{'n'}, size)) {
				t.Errorf("the copy over another object has %d other bytes", len(got))
			}
		})
	}
	wantNoUploads(t, s)
}

// testCopyAgain repeats copies, and copies their targets.
func testCopyAgain(t *testing.T, s object.Store) {
	stable := contentETags(t, s)
	for _, size := range []int{10, object.MinPartSize + 10} {
		body := pattern(size)
		source := putBody(t, s, fmt.Sprintf("%d/0", size), body)
		first := copied(t, s, request(source, fmt.Sprintf("%d/1", size)))
		again := copied(t, s, request(source, fmt.Sprintf("%d/1", size)))
		if stable && first.ETag != again.ETag {
			t.Errorf("%d bytes: the same copy has ETag %s and then %s", size, first.ETag, again.ETag)
		}
		second := copied(t, s, request(again, fmt.Sprintf("%d/2", size)))
		if got, _ := get(t, s, second.Key, 0, -1); !bytes.Equal(got, body) {
			t.Errorf("%d bytes: the copy of a copy has %d other bytes", size, len(got))
		}
		from, err := s.Head(t.Context(), again.Key)
		if err != nil {
			t.Fatal(err)
		}
		to, err := s.Head(t.Context(), second.Key)
		if err != nil {
			t.Fatal(err)
		}
		if stable && !object.ProvedEqual(from, to) { // copies of copies are always provable
			t.Errorf("the copy of a copy is not proved equal: %+v of %+v", to, from)
		}
		remove(t, s, source.Key, again.Key)
		if got, _ := get(t, s, second.Key, 0, -1); !bytes.Equal(got, body) {
			t.Errorf("%d bytes: without its source a copy has %d other bytes", size, len(got))
		}
	}
	wantNoUploads(t, s)
}

func testCopyKeys(t *testing.T, s object.Store) {
	names := []string{
		"a b", " lead", "trail ", "a+b", "a%20b", "%2e%2e", "%", "a?b=c", "?", "a#b", "a&b=c", "a:b@c;d", "'\"<>|*",
		"日本語/文字", "é",
		"e\u0301", "\U0001f600/\U0001f680", "~-._", strings.Repeat("k", 255),
	}
	infos := make(map[string]object.Info)
	for _, name := range names {
		infos[name] = put(t, s, "from/"+name, name)
	}
	large := putBody(t, s, "large/a b+c%20?d é", pattern(object.MinPartSize+1))
	for _, name := range names {
		copied(t, s, request(infos[name], "to/"+name))
	}
	for _, name := range names {
		if got, _ := get(t, s, "to/"+name, 0, -1); string(got) != name {
			t.Errorf("the copy of %q holds %q", name, got)
		}
	}
	copied(t, s, request(large, "large/to a+b%20?c é"))
	if got, _ := get(t, s, "large/to a+b%20?c é", 0, -1); !bytes.Equal(got, pattern(object.MinPartSize+1)) {
		t.Errorf("the large copy has %d bytes that differ from its source", len(got))
	}
	if n := len(list(t, s, "")); n != 2*len(names)+2 {
		t.Errorf("%d objects, want %d", n, 2*len(names)+2)
	}
}

// testCopyConcurrently makes many concurrent copies, also to one key.
func testCopyConcurrently(t *testing.T, s object.Store) {
	small := put(t, s, "small", "small")
	large := putBody(t, s, "large", pattern(11<<20))
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 10 {
				for _, to := range []string{fmt.Sprintf("c/%d/%d", w, i), "c/same"} {
					if _, err := s.Copy(t.Context(), request(small, to)); err != nil {
						t.Errorf("Copy to %s: %v", to, err)
					}
				}
			}
		})
	}
	for w := range 2 {
		wg.Go(func() {
			for _, to := range []string{fmt.Sprintf("l/%d", w), "l/same"} {
				r := request(large, to)
				r.InFlight = 1 + 2*w
				if _, err := s.Copy(t.Context(), r); err != nil {
					t.Errorf("Copy to %s: %v", to, err)
				}
			}
		})
	}
	wg.Wait()
	if infos := list(t, s, "c/"); len(infos) != 81 {
		t.Errorf("%d copies, want 81", len(infos))
	}
	for _, info := range list(t, s, "c/") {
		if got, _ := get(t, s, info.Key, 0, -1); string(got) != "small" {
			t.Errorf("%s holds %q", info.Key, got)
		}
	}
	if diff := cmp.Diff([]string{"l/0", "l/1", "l/same"}, keys(list(t, s, "l/"))); diff != "" {
		t.Errorf("large copies (-want +got):\n%s", diff)
	}
	for _, info := range list(t, s, "l/") {
		if got, _ := get(t, s, info.Key, 0, -1); !bytes.Equal(got, pattern(11<<20)) {
			t.Errorf("%s has %d bytes that differ from its source", info.Key, len(got))
		}
	}
	wantNoUploads(t, s)
}

// testCopyWhileReplaced copies a key during its replacement: the copy is of the requested
// version, or fails.
func testCopyWhileReplaced(t *testing.T, s object.Store) {
	body := func(i int) []byte { return bytes.Repeat(fmt.Append(nil, i%10), 64<<10) }
	infos := make(chan object.Info, 40)
	infos <- putBody(t, s, "w/x", body(0))
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(infos)
		for i := 1; i < 40; i++ {
			info, err := s.Put(t.Context(), "w/x", body(i))
			if err != nil {
				t.Errorf("Put: %v", err)
				return
			}
			infos <- info
		}
	})
	i, made := 0, 0
	for source := range infos {
		_, err := s.Copy(t.Context(), request(source, fmt.Sprintf("w/%d", i)))
		switch {
		case err == nil:
			made++
			if got, _ := get(t, s, fmt.Sprintf("w/%d", i), 0, -1); !bytes.Equal(got, body(i)) {
				t.Errorf("the copy of version %d begins with %.1s", i, got)
			}
		case !errors.Is(err, object.ErrSourceChanged):
			t.Errorf("version %d: %v", i, err)
		}
		i++
	}
	wg.Wait()
	if made == 0 { // the last version is not replaced
		t.Error("no version was copied")
	}
}

// testCopyCanceled cancels copies at different times. The target is then absent or complete.
func testCopyCanceled(t *testing.T, s object.Store) {
	body := pattern(11 << 20)
	source := putBody(t, s, "from", body)
	for i := range 20 {
		to := fmt.Sprintf("to/%d", i)
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*2*time.Millisecond)
		_, err := s.Copy(ctx, request(source, to))
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err = %v, want DeadlineExceeded", err)
		}
		_, headErr := s.Head(t.Context(), to)
		switch {
		case headErr == nil:
			if got, _ := get(t, s, to, 0, -1); !bytes.Equal(got, body) {
				t.Errorf("%s has %d bytes that differ from its source", to, len(got))
			}
		case err == nil || !errors.Is(headErr, object.ErrNotFound):
			t.Errorf("%s: Head returned %v, Copy %v", to, headErr, err)
		}
	}
	wantNoUploads(t, s)
}

func testCopyRefused(t *testing.T, s object.Store) {
	source := put(t, s, "a", "x")
	if info, err := s.Copy(t.Context(), request(source, "a")); !errors.Is(err, object.ErrInvalidKey) {
		t.Errorf("a copy onto itself: %+v, err = %v, want ErrInvalidKey", info, err)
	}
	for name, change := range map[string]func(*object.CopyRequest){
		"no ETag":        func(r *object.CopyRequest) { r.SourceETag = "" },
		"quoted ETag":    func(r *object.CopyRequest) { r.SourceETag = `"` + r.SourceETag + `"` },
		"negative size":  func(r *object.CopyRequest) { r.Size = -1 },
		"too large":      func(r *object.CopyRequest) { r.Size = object.MaxParts*object.MaxPartSize + 1 },
		"small parts":    func(r *object.CopyRequest) { r.Parts.PartSize = object.MinPartSize - 1 },
		"large parts":    func(r *object.CopyRequest) { r.Parts.PartSize = object.MaxPartSize + 1 },
		"threshold":      func(r *object.CopyRequest) { r.Parts.Threshold = -1 },
		"parts at once":  func(r *object.CopyRequest) { r.InFlight = -1 },
		"line in header": func(r *object.CopyRequest) { r.SourceETag = "a\nb" },
	} {
		r := request(source, "b")
		change(&r)
		if info, err := s.Copy(t.Context(), r); err == nil || errors.Is(err, object.ErrUnavailable) ||
			errors.Is(err, object.ErrSourceChanged) {
			t.Errorf("%s: %+v, err = %v, want a refusal", name, info, err)
		}
	}
	if diff := cmp.Diff([]string{"a"}, keys(list(t, s, ""))); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
}

func testAbortUploads(t *testing.T, s object.Store) {
	put(t, s, "a/b", "kept")
	for _, prefix := range []string{"", "a/", "a/b/", "c/"} {
		for _, before := range []time.Time{{}, time.Now().Add(time.Hour)} {
			if n, err := s.AbortUploads(t.Context(), prefix, before); err != nil || n != 0 {
				t.Errorf("%q: %d, %v; want none", prefix, n, err)
			}
		}
		if at, err := s.OldestUpload(t.Context(), prefix); err != nil || !at.IsZero() {
			t.Errorf("%q: an upload of %v, %v; want none", prefix, at, err)
		}
	}
	for _, prefix := range []string{"a", "/", "a//", "../"} {
		if n, err := s.AbortUploads(t.Context(), prefix, time.Time{}); !errors.Is(err, object.ErrInvalidKey) {
			t.Errorf("%q: %d, err = %v, want ErrInvalidKey", prefix, n, err)
		}
		if _, err := s.OldestUpload(t.Context(), prefix); !errors.Is(err, object.ErrInvalidKey) {
			t.Errorf("oldest of %q: err = %v, want ErrInvalidKey", prefix, err)
		}
	}
	if got, _ := get(t, s, "a/b", 0, -1); string(got) != "kept" {
		t.Errorf("the object has %q", got)
	}
}
