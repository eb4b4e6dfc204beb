package s3fault_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/test/s3fault"
)

func TestClassify(t *testing.T) {
	for request, want := range map[string]s3fault.Op{
		"PUT /b/k": s3fault.PutObject, "PUT /b/k?x-id=PutObject": s3fault.PutObject,
		"GET /b/a/b/k?x-id=GetObject": s3fault.GetObject, "HEAD /b/k": s3fault.HeadObject,
		"DELETE /b/k?x-id=DeleteObject": s3fault.DeleteObject, "POST /b?delete=": s3fault.DeleteObjects,
		"POST /b/?delete":             s3fault.DeleteObjects,
		"GET /b?list-type=2&prefix=x": s3fault.ListObjectsV2, "POST /b/k?uploads=": s3fault.CreateMultipartUpload,
		"PUT /b/k?partNumber=1&uploadId=x": s3fault.UploadPart,
		"POST /b/k?uploadId=x":             s3fault.CompleteMultipartUpload,
		"DELETE /b/k?uploadId=x":           s3fault.AbortMultipartUpload,
		"COPY /b/k":                        s3fault.CopyObject, "COPY /b/k?partNumber=1&uploadId=x": s3fault.UploadPartCopy,
		"PUT /b": s3fault.Other, "GET /b/k?uploadId=x": s3fault.Other, "PUT /b/k?tagging": s3fault.Other,
		"GET /": s3fault.Other,
		"GET /b/k?tagging=&x-id=GetObjectTagging": s3fault.GetObjectTagging,
		"GET /b?prefix=x&uploads=":                s3fault.ListMultipartUploads,
	} {
		method, path, _ := strings.Cut(request, " ")
		r := httptest.NewRequest(strings.Replace(method, "COPY", "PUT", 1), path, nil)
		if method == "COPY" {
			r.Header.Set("X-Amz-Copy-Source", "b/s")
		}
		if got, _ := s3fault.Classify(r); got != want {
			t.Errorf("%s is %s, want %s", request, got, want)
		}
	}
}

// recorder records a failed test.
type recorder struct {
	testing.TB
	failed bool
}

func (r *recorder) Helper()               {}
func (r *recorder) Errorf(string, ...any) { r.failed = true }

func TestProxy(t *testing.T) {
	var received atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		received.Add(1)
		w.Header().Set("ETag", `"e"`)
		w.Header().Set("X-Host", r.Host)
		_, _ = io.WriteString(w, "0123456789")
	}))
	defer server.Close()
	p := s3fault.New(t, server.URL)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(method, key string) (int, string, http.Header, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, p.URL()+"/b/"+key, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "signed.example"
		resp, err := client.Do(req)
		if err != nil {
			return 0, "", nil, err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body), resp.Header, err
	}
	for _, c := range []struct {
		name     string
		action   s3fault.Action
		requests int64
		status   int // 0: an error
		body     string
		cut      bool // reading the body fails
	}{
		{
			"status", s3fault.Status(503, "SlowDown"), 0, 503,
			"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>SlowDown</Code><Message>injected</Message></Error>",
			false,
		},
		{"reset", s3fault.Reset(), 0, 0, "", false},
		{"lost", s3fault.Lost(), 1, 0, "", false},
		{"hang", s3fault.Hang(), 0, 0, "", false},
		{"hang after", s3fault.HangAfter(), 1, 0, "", false},
		{"hang in body", s3fault.HangInBody(), 1, 200, "01234", true},
		{"slow", s3fault.Slow(time.Millisecond), 1, 200, "0123456789", false},
		{
			"error in 200", s3fault.ErrorIn200("X"), 1, 200,
			"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>X</Code><Message>injected</Message></Error>", false,
		},
		{"empty", s3fault.Empty200(), 1, 200, "", false},
		{"html", s3fault.HTML200(), 1, 200, "<html><body><h1>Welcome</h1></body></html>", false},
		{"truncate", s3fault.Truncate(), 1, 200, "01234", true},
		{"short", s3fault.Short(), 1, 200, "01234", false},
		{"corrupt", s3fault.Corrupt(), 1, 200, "0123446789", false},
		{"long", s3fault.Long(), 1, 200, "0123456789more", false},
		{"not there", s3fault.NotFound(), 1, 404, "", false},
		{"meanwhile", s3fault.CallBefore(func(*http.Request) { received.Add(100) }), 101, 200, "0123456789", false},
		{"duplicate", s3fault.Duplicate(), 2, 200, "0123456789", false},
		{"strip", s3fault.StripAnswer("ETag"), 1, 200, "0123456789", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.Plan(s3fault.Rule{Op: s3fault.GetObject, Key: regexp.MustCompile("^k$"), Skip: 1, Action: c.action})
			for i, key := range []string{"k", "other"} { // without a fault
				if status, body, h, err := get(
					http.MethodGet,
					key,
				); status != 200 || body != "0123456789" || err != nil ||
					h.Get("X-Host") != "signed.example" {
					t.Errorf("request %d: %d %q %v %v", i, status, body, h, err)
				}
			}
			early := &recorder{}
			if p.MustHaveFired(early); !early.failed || p.Fired() != 0 {
				t.Error("the rule counts as fired")
			}
			received.Store(0)
			status, body, header, err := get(http.MethodGet, "k")
			if status != c.status || body != c.body || (err != nil) != (c.status == 0 || c.cut) {
				t.Errorf("got %d %q, %v", status, body, err)
			}
			if n := received.Load(); n != c.requests {
				t.Errorf("the server got %d requests, want %d", n, c.requests)
			}
			if c.name == "strip" && header.Get("ETag") != "" {
				t.Errorf("header %v", header)
			}
			p.MustHaveFired(t)
			if n := p.Count(s3fault.GetObject); n != 3 || p.Fired() != 1 {
				t.Errorf("%d requests, %d fired: %v", n, p.Fired(), p.Events())
			}
			if status, body, _, err := get(http.MethodGet, "k"); status != 200 || body != "0123456789" || err != nil {
				t.Errorf("after it: %d %q %v", status, body, err)
			}
		})
	}
	// An action without anything to change does not count as fired.
	p.Plan(s3fault.Rule{Op: s3fault.HeadObject, Times: -1, Action: s3fault.Corrupt()})
	if status, _, _, err := get(http.MethodHead, "k"); status != 200 || err != nil || p.Fired() != 0 {
		t.Errorf("%d, %v; fired %d", status, err, p.Fired())
	}
	p.Plan(s3fault.Rule{Op: s3fault.HeadObject, Action: s3fault.WrongLength()})
	if status, _, header, err := get(
		http.MethodHead,
		"k",
	); status != 200 || err != nil || p.Fired() != 1 ||
		header.Get("Content-Length") != "11" {
		t.Errorf("%d, %v, %v; fired %d", status, header, err, p.Fired())
	}
	server.Close()
	p.Plan()
	if status, _, _, err := get(
		http.MethodGet,
		"k",
	); status != http.StatusBadGateway ||
		errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without a server: %d, %v", status, err)
	}
}

func TestListings(t *testing.T) {
	entry := func(key string) string {
		return "<Contents><Key>" + key + "</Key><LastModified>2026-01-02T03:04:05.006Z</LastModified></Contents>"
	}
	list := func(count string, keys ...string) string {
		s := "<R><KeyCount>" + count + "</KeyCount>"
		for _, key := range keys {
			s += entry(key)
		}
		return s + "<Prefix>p/</Prefix></R>"
	}
	answer := list("3", "p/a", "p/b", "p/c")
	server := httptest.NewServer(
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, answer) }),
	)
	defer server.Close()
	get := func(p *s3fault.Proxy) string {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, p.URL()+"/b?list-type=2", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return string(body)
	}
	p := s3fault.New(t, server.URL)
	for _, c := range []struct {
		action s3fault.Action
		want   string
	}{
		{s3fault.ListMisses(), list("2", "p/a", "p/c")},
		{s3fault.ListDuplicates(), list("4", "p/a", "p/b", "p/b", "p/c")},
		{s3fault.ListForeign("z"), list("4", "p/a", "p/b", "p/c", "z")},
	} {
		p.Plan(s3fault.Rule{Op: s3fault.ListObjectsV2, Action: c.action})
		if diff := cmp.Diff(c.want, get(p)); diff != "" {
			t.Error(diff)
		}
		p.MustHaveFired(t)
		if got := get(p); got != answer {
			t.Errorf("after it: %s", got)
		}
	}
	old := s3fault.New(t, server.URL)
	old.Age(2 * time.Hour)
	if diff := cmp.Diff(strings.ReplaceAll(answer, "T03:", "T01:"), get(old)); diff != "" {
		t.Error(diff)
	}
	answer = "<R></R>"
	p.Plan(s3fault.Rule{Op: s3fault.ListObjectsV2, Action: s3fault.ListMisses()})
	if get(p); p.Fired() != 0 {
		t.Error("the rule counts as fired on an empty listing")
	}
}

func TestOnRequest(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer server.Close()
	p := s3fault.New(t, server.URL)
	var got []s3fault.ServerRequest
	p.OnRequest(func(a s3fault.ServerRequest) { got = append(got, a) })
	p.Plan(
		s3fault.Rule{Op: s3fault.HeadObject, Action: s3fault.Reset()},
		s3fault.Rule{Op: s3fault.GetObject, Action: s3fault.Duplicate()},
	)
	for _, r := range []struct{ method, path, body string }{
		{http.MethodHead, "/b/never", ""},
		{http.MethodGet, "/b/twice", ""},
		{http.MethodDelete, "/b/a/k", ""},
		{http.MethodDelete, "/b/a/k?uploadId=x", ""},
		{
			http.MethodPost, "/b?delete=",
			`<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/">` +
				`<Object><Key>a&amp;b</Key></Object><Object><Key>c</Key></Object></Delete>`,
		},
		{http.MethodPost, "/b?delete=", "no XML"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, p.URL()+r.path, strings.NewReader(r.body))
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			_ = resp.Body.Close()
		}
	}
	want := []s3fault.ServerRequest{
		{Op: s3fault.GetObject, Key: "twice"},
		{Op: s3fault.GetObject, Key: "twice"},
		{Op: s3fault.DeleteObject, Key: "a/k", Deletes: []string{"a/k"}},
		{Op: s3fault.AbortMultipartUpload, Key: "a/k"},
		{Op: s3fault.DeleteObjects, Deletes: []string{"a&b", "c"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
