//go:build unix

package crashpoint

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]Pass{
		"":                    {},
		"create.begin:before": {"create.begin", Before, 1},
		"create.begin:after":  {"create.begin", After, 1},
		"create.begin:after:": {},
		"a:after:12":          {"a", After, 12},
		"a:after:0":           {},
		"a:after:-1":          {},
		"a:after:1:1":         {},
		"a:between":           {},
		":before":             {},
		"a":                   {},
	} {
		if got, err := Parse(text); got != want || (err != nil) != (want == Pass{}) {
			t.Errorf("Parse(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
}

// inChild is set in a child, which makes two steps three times.
const inChild = "CRASHPOINT_CHILD"

// TestChild is the child. In any other process it does nothing.
func TestChild(t *testing.T) {
	if os.Getenv(inChild) == "" {
		return
	}
	p, err := New(os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	kv := p.KV(memory.New(memory.Options{}))
	for range 3 {
		for _, name := range []string{"test.first", "", "test.second"} {
			if _, err := kv.Txn(t.Context(), meta.Txn{Name: name, Then: []meta.Op{meta.Put("/a", nil)}}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stdout.WriteString("passed\n"); err != nil {
			t.Fatal(err)
		}
		if name := os.Getenv(FromVariable); name != "" {
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// child runs a child. It returns the number of its rounds, whether it was killed, and
// its standard error.
func child(t *testing.T, env ...string) (rounds int, killed bool, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestChild$")
	cmd.Env = append(append(os.Environ(), inChild+"=1"), env...)
	var text strings.Builder
	cmd.Stderr = &text
	out, _ := cmd.Output()
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	killed = status.Signaled() && status.Signal() == syscall.SIGKILL
	if !killed && !cmd.ProcessState.Success() {
		t.Fatalf("the child failed: %s %s", out, text.String())
	}
	return strings.Count(string(out), "passed"), killed, text.String()
}

func TestKill(t *testing.T) {
	for crash, want := range map[string]int{
		"": 3, "test.none:before": 3, "test.first:before": 0, "test.second:after": 0, "test.second:before:2": 1,
		"test.first:after:3": 2, "test.first:after:4": 3,
	} {
		rounds, killed, stderr := child(t, Variable+"="+crash)
		if rounds != want || killed != (want < 3) {
			t.Errorf("%q: %d rounds, killed %v, want %d rounds", crash, rounds, killed, want)
		}
		if killed != strings.Contains(stderr, "crash point "+crash) {
			t.Errorf("%q: standard error is %q", crash, stderr)
		}
	}
}

func TestFrom(t *testing.T) {
	for crash, want := range map[string]int{"test.first:before": 1, "test.second:after:2": 2, "test.second:after:3": 3} {
		rounds, killed, _ := child(t, Variable+"="+crash, FromVariable+"="+filepath.Join(t.TempDir(), "from"))
		if rounds != want || killed != (want < 3) {
			t.Errorf("%q: %d rounds, killed %v, want %d rounds", crash, rounds, killed, want)
		}
	}
}

func TestReached(t *testing.T) {
	name := filepath.Join(t.TempDir(), "reached")
	child(t, Variable+"=test.second:before:2", ReachedVariable+"="+name)
	const want = "test.first:before\ntest.first:after\ntest.second:before\ntest.second:after\n"
	if diff := cmp.Diff(want, read(t, name)); diff != "" {
		t.Errorf("the points reached differ (-want +got):\n%s", diff)
	}
}

func TestWrongVariable(t *testing.T) {
	env := map[string]string{Variable: "create.commit"}
	if _, err := New(func(name string) string { return env[name] }); err == nil {
		t.Error("a text that is no pass was accepted")
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// recording returns points that record in a file.
func recording(t *testing.T) (p *Points, name string) {
	t.Helper()
	name = filepath.Join(t.TempDir(), "reached")
	env := map[string]string{ReachedVariable: name}
	p, err := New(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	return p, name
}

func TestLeases(t *testing.T) {
	p, name := recording(t)
	kv := p.KV(memory.New(memory.Options{}))
	for _, step := range []string{"elect.claim", "restore.worker"} {
		lease, err := kv.Grant(t.Context(), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Txn(
			t.Context(),
			meta.Txn{Name: step, Then: []meta.Op{meta.PutLeased("/a", nil, lease)}},
		); err != nil {
			t.Fatal(err)
		}
		if err := kv.Revoke(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
	}
	const want = "elect.claim:before\nelect.claim:after\nelect.resign:before\nelect.resign:after\n" +
		"restore.worker:before\nrestore.worker:after\n"
	if diff := cmp.Diff(want, read(t, name)); diff != "" {
		t.Errorf("the points reached differ (-want +got):\n%s", diff)
	}
}

func TestObjects(t *testing.T) {
	p, name := recording(t)
	store := p.Store(objectmemory.New(objectmemory.Options{}))
	create := func(key string) {
		t.Helper()
		if _, err := store.Create(t.Context(), key, []byte("a")); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{
		"snapshots/1/2/manifest-0.avro", "snapshots/1/2/refs.avro", "snapshots/1/2/metadata.json", "snapshots/identity.json",
		"gc/epoch/1.json", "gc/held/1/2", "gc/restore/1/0.json", "snapshotd-probe/a", "engine/1/2",
	} {
		create(key)
	}
	for _, key := range []string{
		"snapshots/1/2/refs.avro", "gc/epoch/1.json", "gc/held/1/2", "gc/restore/1/0.json", "snapshotd-probe/a", "engine/1/2",
	} {
		if err := store.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for line := range strings.Lines(read(t, name)) {
		if step, ok := strings.CutSuffix(line, ":after\n"); ok {
			got = append(got, step)
		}
	}
	want := []string{
		"create.manifest", "create.refs", "create.metadata", "start.identity", "epoch.create", "held.put", "restore.pin",
		"drop.objects", "epoch.forget", "held.delete", "restore.pins", "file.delete",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the steps differ (-want +got):\n%s", diff)
	}
}

func TestRequests(t *testing.T) {
	p, name := recording(t)
	server := httptest.NewServer(
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "answer") }),
	)
	defer server.Close()
	client := &http.Client{Transport: p.Transport(http.DefaultTransport)}
	for _, r := range []struct {
		method, query string
		copied        bool
	}{
		{"GET", "", false},
		{"GET", "?uploads", false},
		{"GET", "?uploadId=1", false},
		{"HEAD", "", false},
		{"PUT", "?x-id=PutObject", false},
		{"PUT", "", true},
		{"POST", "?uploads", false},
		{"PUT", "?partNumber=1&uploadId=1", true},
		{"POST", "?uploadId=1", false},
		{"DELETE", "?uploadId=1", false},
		{"POST", "?delete", false},
		{"DELETE", "", false},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, server.URL+"/bucket/key"+r.query, nil)
		if err != nil {
			t.Fatal(err)
		}
		if r.copied {
			req.Header.Set("X-Amz-Copy-Source", "bucket/other")
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || r.method != "HEAD" && string(body) != "answer" {
			t.Errorf("%s: %q, %v", r.method, body, err)
		}
		if err := resp.Body.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for line := range strings.Lines(read(t, name)) {
		if step, ok := strings.CutSuffix(line, ":after\n"); ok {
			got = append(got, step)
		}
	}
	want := []string{
		"bucket.put",
		"bucket.copy",
		"bucket.begin",
		"bucket.part",
		"bucket.complete",
		"bucket.abort",
		"bucket.delete",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the steps differ (-want +got):\n%s", diff)
	}
}
