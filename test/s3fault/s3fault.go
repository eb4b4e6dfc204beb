// Package s3fault has a proxy for an S3 server that injects planned faults, before
// a request reaches the server or after the server has executed it.
package s3fault

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// Op is the operation of a request.
type Op string

// The operations. Any other request is Other.
const (
	PutObject               Op = "PutObject"
	GetObject               Op = "GetObject"
	HeadObject              Op = "HeadObject"
	DeleteObject            Op = "DeleteObject"
	DeleteObjects           Op = "DeleteObjects"
	ListObjectsV2           Op = "ListObjectsV2"
	CreateMultipartUpload   Op = "CreateMultipartUpload"
	UploadPart              Op = "UploadPart"
	UploadPartCopy          Op = "UploadPartCopy"
	CompleteMultipartUpload Op = "CompleteMultipartUpload"
	AbortMultipartUpload    Op = "AbortMultipartUpload"
	CopyObject              Op = "CopyObject"
	GetObjectTagging        Op = "GetObjectTagging"
	ListMultipartUploads    Op = "ListMultipartUploads"
	Other                   Op = "Other"
)

// Classify returns the operation and the key of a request. The key is the path
// without the bucket, empty for a request on the bucket.
func Classify(r *http.Request) (Op, string) {
	_, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	q := r.URL.Query()
	copied := r.Header.Get("X-Amz-Copy-Source") != ""
	if key == "" {
		switch {
		case r.Method == http.MethodGet && q.Get("list-type") == "2":
			return ListObjectsV2, ""
		case r.Method == http.MethodPost && q.Has("delete"):
			return DeleteObjects, ""
		case r.Method == http.MethodGet && q.Has("uploads"):
			return ListMultipartUploads, ""
		}
		return Other, ""
	}
	op := Other
	switch r.Method {
	case http.MethodPut:
		switch {
		case q.Has("partNumber") && copied:
			op = UploadPartCopy
		case q.Has("partNumber"):
			op = UploadPart
		case copied:
			op = CopyObject
		case len(q) == 0 || len(q) == 1 && q.Has("x-id"):
			op = PutObject
		}
	case http.MethodPost:
		switch {
		case q.Has("uploads"):
			op = CreateMultipartUpload
		case q.Has("uploadId"):
			op = CompleteMultipartUpload
		}
	case http.MethodDelete:
		op = DeleteObject
		if q.Has("uploadId") {
			op = AbortMultipartUpload
		}
	case http.MethodHead:
		op = HeadObject
	case http.MethodGet:
		switch {
		case q.Has("tagging"):
			op = GetObjectTagging
		case !q.Has("uploadId"):
			op = GetObject
		}
	}
	return op, key
}

// Rule plans a fault.
type Rule struct {
	// Op is the operation. Default: any.
	Op Op
	// Key is the pattern of the key. Default: any.
	Key *regexp.Regexp
	// Skip is the number of matching requests that pass first.
	Skip int
	// Times is the number of requests with the fault after that. Default: 1;
	// negative: all.
	Times int
	// Action is the fault.
	Action Action
}

// Action is a fault of a request.
type Action struct {
	name string
	// before may change the request, or respond instead of the server.
	before func(p *Proxy, w http.ResponseWriter, r *http.Request) (answered bool)
	// after replaces the server's response. It returns false if the response has
	// nothing to change.
	after func(p *Proxy, w http.ResponseWriter, r *http.Request, answer *Answer) bool
	twice bool
}

// Answer is a response.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

func (a *Answer) write(w http.ResponseWriter) {
	maps.Copy(w.Header(), a.Header)
	w.WriteHeader(a.Status)
	_, _ = w.Write(a.Body) // the client may be gone
}

// Status responds with an S3 error. The server gets no request.
func Status(status int, code string) Action { return StatusWith(status, code, nil) }

// StatusWith is [Status] with header fields.
func StatusWith(status int, code string, header http.Header) Action {
	return Instead(&Answer{Status: status, Header: header, Body: xmlError(code)})
}

// Instead responds with answer. The server gets no request.
func Instead(answer *Answer) Action {
	return Action{
		name: fmt.Sprintf("status %d %.60q", answer.Status, answer.Body),
		before: func(_ *Proxy, w http.ResponseWriter, _ *http.Request) bool {
			answer.write(w)
			return true
		},
	}
}

// After lets the server execute the request and responds with answer.
func After(answer *Answer) Action {
	return Edit(
		fmt.Sprintf("answer %d %.60q", answer.Status, answer.Body),
		func(a *Answer) bool { *a = *answer; return true },
	)
}

// Edit lets the server execute the request and changes its response. A change that
// returns false does not count as fired.
func Edit(name string, change func(*Answer) bool) Action {
	return Action{name: name, after: func(_ *Proxy, w http.ResponseWriter, _ *http.Request, a *Answer) bool {
		length := len(a.Body)
		fired := change(a)
		if len(a.Body) != length && a.Header.Get("Content-Length") != "" { // a HEAD has one without a body
			a.Header.Set("Content-Length", strconv.Itoa(len(a.Body)))
		}
		a.write(w)
		return fired
	}}
}

// Reset resets the connection. The server gets no request.
func Reset() Action {
	return Action{
		name:   "reset",
		before: func(_ *Proxy, w http.ResponseWriter, _ *http.Request) bool { reset(w); return true },
	}
}

// Lost lets the server execute the request and resets the connection.
func Lost() Action {
	return Action{
		name:  "lost",
		after: func(_ *Proxy, w http.ResponseWriter, _ *http.Request, _ *Answer) bool { reset(w); return true },
	}
}

// Hang never responds. The server gets no request.
func Hang() Action {
	return Action{
		name:   "hang",
		before: func(p *Proxy, _ http.ResponseWriter, r *http.Request) bool { p.hang(r); return true },
	}
}

// HangAfter lets the server execute the request and never responds.
func HangAfter() Action {
	return Action{name: "hang after", after: func(p *Proxy, w http.ResponseWriter, r *http.Request, _ *Answer) bool {
		w.(*heldWriter).send(true) // only counts
		p.hang(r)
		return true
	}}
}

// HangInBody sends half of the body and never the rest.
func HangInBody() Action {
	return Action{name: "hang in body", after: func(p *Proxy, w http.ResponseWriter, r *http.Request, a *Answer) bool {
		if !a.half(w) {
			return false
		}
		p.hang(r)
		return true
	}}
}

// Truncate sends half of the body and resets the connection.
func Truncate() Action {
	return Action{name: "truncate", after: func(_ *Proxy, w http.ResponseWriter, _ *http.Request, a *Answer) bool {
		if !a.half(w) {
			return false
		}
		reset(w)
		return true
	}}
}

// half sends the header and half of the body. It returns false without a body.
func (a *Answer) half(w http.ResponseWriter) bool {
	if len(a.Body) < 2 {
		a.write(w)
		return false
	}
	a.Header.Set("Content-Length", strconv.Itoa(len(a.Body)))
	(&Answer{Status: a.Status, Header: a.Header, Body: a.Body[:len(a.Body)/2]}).write(w)
	_ = http.NewResponseController(w).Flush() // the client may be gone
	return true
}

// Slow delays the request before it reaches the server.
func Slow(d time.Duration) Action {
	return Action{name: "slow", before: func(p *Proxy, _ http.ResponseWriter, r *http.Request) bool {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
		case <-p.closed:
		}
		return false
	}}
}

// ErrorIn200 lets the server execute the request and responds with 200 and an
// error in the body.
func ErrorIn200(code string) Action {
	return After(
		&Answer{Status: http.StatusOK, Header: http.Header{"Content-Type": {"application/xml"}}, Body: xmlError(code)},
	)
}

// Empty200 lets the server execute the request and responds with an empty 200.
func Empty200() Action { return After(&Answer{Status: http.StatusOK, Header: http.Header{}}) }

// HTML200 lets the server execute the request and responds with 200 and a page.
func HTML200() Action {
	return After(&Answer{
		Status: http.StatusOK, Header: http.Header{"Content-Type": {"text/html"}},
		Body: []byte("<html><body><h1>Welcome</h1></body></html>"),
	})
}

// Corrupt inverts one bit in the middle of the body.
func Corrupt() Action {
	return Edit("corrupt", func(a *Answer) bool {
		if len(a.Body) == 0 {
			return false
		}
		a.Body[len(a.Body)/2] ^= 1
		return true
	})
}

// Short cuts off the second half of the body, with a matching Content-Length.
func Short() Action {
	return Edit("short", func(a *Answer) bool {
		if len(a.Body) < 2 {
			return false
		}
		a.Body = a.Body[:len(a.Body)/2]
		return true
	})
}

// Long appends bytes to the body, with a matching Content-Length.
func Long() Action {
	return Edit("long", func(a *Answer) bool {
		if len(a.Body) == 0 {
			return false
		}
		a.Body = append(a.Body, "more"...)
		return true
	})
}

// WrongLength adds one to the Content-Length of the response to a HEAD.
func WrongLength() Action {
	return Edit("wrong length", func(a *Answer) bool {
		n, err := strconv.Atoi(a.Header.Get("Content-Length"))
		if err != nil || a.Status != http.StatusOK || len(a.Body) > 0 {
			return false
		}
		a.Header.Set("Content-Length", strconv.Itoa(n+1))
		return true
	})
}

// NotFound responds with 404 for an existing object.
func NotFound() Action {
	return Edit("not there", func(a *Answer) bool {
		if a.Status != http.StatusOK {
			return false
		}
		*a = Answer{Status: http.StatusNotFound, Header: http.Header{}}
		return true
	})
}

// The elements of a listing.
var (
	listed   = regexp.MustCompile(`(?s)<Contents>.*?</Contents>`)
	keyOf    = regexp.MustCompile(`<Key>[^<]*</Key>`)
	keyCount = regexp.MustCompile(`<KeyCount>\d+</KeyCount>`)
	modified = regexp.MustCompile(`<LastModified>([^<]*)</LastModified>`)
)

// editList changes the entries of a listing and its KeyCount. It does not fire on an
// empty listing.
func editList(name string, change func(entries []string) []string) Action {
	return Edit(name, func(a *Answer) bool {
		entries := listed.FindAllString(string(a.Body), -1)
		if len(entries) == 0 {
			return false
		}
		at := listed.FindIndex(a.Body)[0]
		rest := listed.ReplaceAllLiteralString(string(a.Body), "")
		entries = change(entries)
		body := rest[:at] + strings.Join(entries, "") + rest[at:]
		a.Body = []byte(keyCount.ReplaceAllLiteralString(body, fmt.Sprintf("<KeyCount>%d</KeyCount>", len(entries))))
		return true
	})
}

// ListMisses removes one object from a listing.
func ListMisses() Action {
	return editList(
		"list misses",
		func(entries []string) []string { return slices.Delete(entries, len(entries)/2, len(entries)/2+1) },
	)
}

// ListDuplicates repeats one object of a listing.
func ListDuplicates() Action {
	return editList("list twice", func(entries []string) []string {
		return slices.Insert(entries, len(entries)/2, entries[len(entries)/2])
	})
}

// ListForeign adds an object to a listing, with a key outside its prefix.
func ListForeign(key string) Action {
	return editList("list stray", func(entries []string) []string {
		return append(entries, keyOf.ReplaceAllLiteralString(entries[len(entries)-1], "<Key>"+key+"</Key>"))
	})
}

// CallBefore calls fn before the request reaches the server. Fn must be safe for
// concurrent use.
func CallBefore(fn func(r *http.Request)) Action {
	return Action{name: "meanwhile", before: func(_ *Proxy, _ http.ResponseWriter, r *http.Request) bool {
		fn(r)
		return false
	}}
}

// StripRequest removes a header field of the request and signs the request again.
func StripRequest(name string, accessKeyID, secret string) Action {
	return Action{name: "strip " + name, before: func(_ *Proxy, w http.ResponseWriter, r *http.Request) bool {
		r.Header.Del(name)
		if err := Resign(r, accessKeyID, secret); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return true
		}
		return false
	}}
}

// StripAnswer removes header fields of the response.
func StripAnswer(names ...string) Action {
	return Edit("strip "+strings.Join(names, ", "), func(a *Answer) bool {
		found := false
		for _, name := range names {
			found = found || a.Header.Get(name) != ""
			a.Header.Del(name)
		}
		return found
	})
}

// Duplicate sends the request to the server twice and returns the second response.
func Duplicate() Action { return Action{name: "duplicate", twice: true} }

func xmlError(code string) []byte {
	return fmt.Appendf(
		nil,
		"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code><Message>injected</Message></Error>",
		code,
	)
}

// Event is a request that the proxy has received.
type Event struct {
	Op           Op
	Key          string
	Action       string // empty: none
	ServerStatus int    // 0: the server got no request
}

// Proxy is a running proxy. It is safe for concurrent use.
type Proxy struct {
	server *httptest.Server
	target *url.URL
	next   *httputil.ReverseProxy
	closed chan struct{}

	mu        sync.Mutex
	rules     []*plannedRule
	events    []Event
	onRequest func(ServerRequest)
	age       time.Duration
}

// ServerRequest is a request to the server.
type ServerRequest struct {
	Op  Op
	Key string
	// Deletes are the deleted keys of a DeleteObject or DeleteObjects.
	Deletes []string
}

type plannedRule struct {
	Rule
	seen, fired int
}

// New starts a proxy of the S3 server at endpoint. It stops at the end of the test.
func New(tb testing.TB, endpoint string) *Proxy {
	tb.Helper()
	target, err := url.Parse(endpoint)
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{target: target, closed: make(chan struct{})}
	p.next = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host
			r.Out.Host = r.In.Host // the signature covers it
		},
		Transport:    &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	p.server = httptest.NewServer(p)
	tb.Cleanup(func() {
		close(p.closed)
		p.server.Close()
		p.next.Transport.(*http.Transport).CloseIdleConnections()
	})
	return p
}

// URL returns the address of the proxy.
func (p *Proxy) URL() string { return p.server.URL }

// Plan replaces the rules and clears the events. The first matching rule applies to
// a request.
func (p *Proxy) Plan(rules ...Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rules, p.events = nil, nil
	for _, r := range rules {
		if r.Times == 0 {
			r.Times = 1
		}
		p.rules = append(p.rules, &plannedRule{Rule: r})
	}
}

// OnRequest calls fn before each request to the server, twice for a duplicated one.
// Fn must be safe for concurrent use. OnRequest is called before the first request;
// Plan keeps fn.
func (p *Proxy) OnRequest(fn func(ServerRequest)) { p.onRequest = fn }

// Age makes the objects in every listing older by d. It is called before the first
// request; Plan keeps the age.
func (p *Proxy) Age(d time.Duration) { p.age = d }

// aged returns a listing whose objects are older by the duration.
func aged(body []byte, by time.Duration) []byte {
	return modified.ReplaceAllFunc(body, func(element []byte) []byte {
		at, err := time.Parse(time.RFC3339, string(modified.FindSubmatch(element)[1]))
		if err != nil {
			return element
		}
		return fmt.Appendf(nil, "<LastModified>%s</LastModified>", at.Add(-by).Format("2006-01-02T15:04:05.000Z07:00"))
	})
}

// deletes returns the keys that a request deletes.
func deletes(op Op, key string, body []byte) ([]string, error) {
	switch op {
	case DeleteObject:
		return []string{key}, nil
	case DeleteObjects:
		var list struct {
			Object []struct{ Key string }
		}
		if err := xml.Unmarshal(body, &list); err != nil {
			return nil, err
		}
		keys := make([]string, len(list.Object))
		for i, o := range list.Object {
			keys[i] = o.Key
		}
		return keys, nil
	default:
		return nil, nil
	}
}

// Events returns the requests since the last Plan.
func (p *Proxy) Events() []Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.events)
}

// Count returns the number of requests of an operation since the last Plan.
func (p *Proxy) Count(op Op) int {
	n := 0
	for _, e := range p.Events() {
		if e.Op == op {
			n++
		}
	}
	return n
}

// Fired returns the number of faults since the last Plan.
func (p *Proxy) Fired() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, r := range p.rules {
		n += r.fired
	}
	return n
}

// MustHaveFired fails the test for each rule that did not fire: without its fault
// the test proves nothing.
func (p *Proxy) MustHaveFired(tb testing.TB) {
	tb.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, r := range p.rules {
		if r.fired == 0 {
			tb.Errorf("rule %d, %s of %q, did not fire; requests: %v", i, r.Action.name, r.Op, p.events)
		}
	}
}

// match returns the rule for a request, or nil.
func (p *Proxy) match(op Op, key string) *plannedRule {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.rules {
		if r.Op != "" && r.Op != op || r.Key != nil && !r.Key.MatchString(key) {
			continue
		}
		r.seen++
		if r.seen > r.Skip && (r.Times < 0 || r.seen <= r.Skip+r.Times) {
			return r
		}
	}
	return nil
}

func (p *Proxy) record(e Event, r *plannedRule, fired bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r != nil && fired {
		e.Action = r.Action.name
		r.fired++
	}
	p.events = append(p.events, e)
}

// ServeHTTP implements http.Handler.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	op, key := Classify(r)
	body, err := io.ReadAll(r.Body)
	if err != nil {
		reset(w)
		return
	}
	e := Event{Op: op, Key: key}
	rule := p.match(op, key)
	if rule != nil && rule.Action.before != nil {
		// The client may see the effect before the call returns.
		p.record(e, rule, true)
		if rule.Action.before(p, w, r) {
			return
		}
		p.send(r, body).write(w)
		return
	}
	answer := p.send(r, body)
	if rule != nil && rule.Action.twice {
		answer = p.send(r, body)
	}
	e.ServerStatus = answer.Status
	switch {
	case rule == nil || rule.Action.after == nil:
		p.record(e, rule, true)
		answer.write(w)
	default:
		// The count must be right when the client gets the response.
		held := &heldWriter{ResponseWriter: w, first: func(fired bool) { p.record(e, rule, fired) }}
		held.send(rule.Action.after(p, held, r, answer))
	}
}

// heldWriter buffers a response until the proxy has recorded whether the fault
// fired. An action that hijacks or flushes the connection sends the buffer first.
type heldWriter struct {
	http.ResponseWriter
	first  func(fired bool)
	once   sync.Once
	status int
	body   bytes.Buffer
}

func (w *heldWriter) WriteHeader(status int) { w.status = status }

func (w *heldWriter) Write(b []byte) (int, error) { return w.body.Write(b) }

// Unwrap sends the buffer and returns the wrapped writer.
func (w *heldWriter) Unwrap() http.ResponseWriter {
	w.send(true)
	return w.ResponseWriter
}

func (w *heldWriter) send(fired bool) {
	w.once.Do(func() {
		w.first(fired)
		if w.status == 0 {
			return
		}
		w.ResponseWriter.WriteHeader(w.status)
		_, _ = w.ResponseWriter.Write(w.body.Bytes()) // the client may be gone
	})
}

// send forwards the request to the server.
func (p *Proxy) send(r *http.Request, body []byte) *Answer {
	if p.onRequest != nil {
		op, key := Classify(r)
		keys, err := deletes(op, key, body)
		if err != nil { // a malformed request does not reach the server
			return &Answer{Status: http.StatusBadRequest, Header: http.Header{}, Body: xmlError("MalformedXML")}
		}
		p.onRequest(ServerRequest{Op: op, Key: key, Deletes: keys})
	}
	out := r.Clone(r.Context())
	out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	rec := httptest.NewRecorder()
	p.next.ServeHTTP(rec, out)
	answer := &Answer{Status: rec.Code, Header: rec.Header().Clone(), Body: rec.Body.Bytes()}
	if op, _ := Classify(r); op == ListObjectsV2 && p.age != 0 {
		answer.Body = aged(answer.Body, p.age)
		answer.Header.Del("Content-Length") // the proxy sets it again
	}
	return answer
}

func (p *Proxy) hang(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-p.closed:
	}
	panic(http.ErrAbortHandler)
}

// Resign signs a changed request again, with its payload hash and its date.
func Resign(r *http.Request, accessKeyID, secret string) error {
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host = "http", r.Host
	out.Header.Del("Authorization")
	for _, name := range []string{"Accept-Encoding", "Content-Length", "User-Agent", "Connection", "Expect"} {
		out.Header.Del(name)
	}
	hash := r.Header.Get("X-Amz-Content-Sha256")
	signer := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil {
		return err
	}
	if err := signer.SignHTTP(
		r.Context(),
		aws.Credentials{AccessKeyID: accessKeyID, SecretAccessKey: secret},
		out,
		hash,
		"s3",
		"us-east-1",
		at,
	); err != nil {
		return err
	}
	r.Header.Set("Authorization", out.Header.Get("Authorization"))
	return nil
}

// reset closes the client's connection with a TCP reset instead of a FIN.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // the close below matters
	}
	_ = conn.Close()
}
