// Package s3fault is a proxy in front of an S3 server that makes requests fail
// as planned: before they reach the server or after it has carried them out.
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

// Op is what a request is.
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

// Classify says what a request is, and which object it is about: the path
// without the bucket, empty if it is about the bucket.
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
	// Op is the operation that it concerns. Default: any.
	Op Op
	// Key is what the key must match. Default: any.
	Key *regexp.Regexp
	// Skip is how many such requests are let through first.
	Skip int
	// Times is how many are then concerned. Default: 1; negative: all.
	Times int
	// Action is what happens to them.
	Action Action
}

// Action is what happens to a request.
type Action struct {
	name string
	// before may change the request, or answer it instead of the server.
	before func(p *Proxy, w http.ResponseWriter, r *http.Request) (answered bool)
	// after gets the server's answer and gives the client another. It returns
	// false, and does nothing, when there is nothing to do it to.
	after func(p *Proxy, w http.ResponseWriter, r *http.Request, answer *Answer) bool
	twice bool
}

// Answer is what the server answered.
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

// Status answers with an error of S3 and does not ask the server.
func Status(status int, code string) Action { return StatusWith(status, code, nil) }

// StatusWith is Status with header fields.
func StatusWith(status int, code string, header http.Header) Action {
	return Instead(&Answer{Status: status, Header: header, Body: xmlError(code)})
}

// Instead answers so and does not ask the server.
func Instead(answer *Answer) Action {
	return Action{
		name: fmt.Sprintf("status %d %.60q", answer.Status, answer.Body),
		before: func(_ *Proxy, w http.ResponseWriter, _ *http.Request) bool {
			answer.write(w)
			return true
		},
	}
}

// After has the server carry the request out and answers so.
func After(answer *Answer) Action {
	return Edit(
		fmt.Sprintf("answer %d %.60q", answer.Status, answer.Body),
		func(a *Answer) bool { *a = *answer; return true },
	)
}

// Edit has the server carry the request out and changes its answer. A change
// that returns false has found nothing to change and does not count as fired.
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

// Reset breaks the connection before the server is asked.
func Reset() Action {
	return Action{
		name:   "reset",
		before: func(_ *Proxy, w http.ResponseWriter, _ *http.Request) bool { reset(w); return true },
	}
}

// Lost has the server carry the request out and loses its answer.
func Lost() Action {
	return Action{
		name:  "lost",
		after: func(_ *Proxy, w http.ResponseWriter, _ *http.Request, _ *Answer) bool { reset(w); return true },
	}
}

// Hang never answers, and does not ask the server.
func Hang() Action {
	return Action{
		name:   "hang",
		before: func(p *Proxy, _ http.ResponseWriter, r *http.Request) bool { p.hang(r); return true },
	}
}

// HangAfter has the server carry the request out and never answers.
func HangAfter() Action {
	return Action{name: "hang after", after: func(p *Proxy, w http.ResponseWriter, r *http.Request, _ *Answer) bool {
		w.(*lateWriter).send(true) // only counts
		p.hang(r)
		return true
	}}
}

// HangInBody sends half of the body and then no more.
func HangInBody() Action {
	return Action{name: "hang in body", after: func(p *Proxy, w http.ResponseWriter, r *http.Request, a *Answer) bool {
		if !a.half(w) {
			return false
		}
		p.hang(r)
		return true
	}}
}

// Truncate sends half of the body and breaks the connection.
func Truncate() Action {
	return Action{name: "truncate", after: func(_ *Proxy, w http.ResponseWriter, _ *http.Request, a *Answer) bool {
		if !a.half(w) {
			return false
		}
		reset(w)
		return true
	}}
}

// half sends the header and half of the body, and says whether there was one.
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

// Slow waits before the server is asked.
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

// ErrorIn200 has the server carry the request out and answers 200 with an error
// in the body.
func ErrorIn200(code string) Action {
	return After(
		&Answer{Status: http.StatusOK, Header: http.Header{"Content-Type": {"application/xml"}}, Body: xmlError(code)},
	)
}

// Empty200 has the server carry the request out and answers 200 with nothing.
func Empty200() Action { return After(&Answer{Status: http.StatusOK, Header: http.Header{}}) }

// HTML200 has the server carry the request out and answers 200 with a page.
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

// Short leaves the second half of the body out, and says so in Content-Length.
func Short() Action {
	return Edit("short", func(a *Answer) bool {
		if len(a.Body) < 2 {
			return false
		}
		a.Body = a.Body[:len(a.Body)/2]
		return true
	})
}

// Long adds bytes to the body, and says so in Content-Length.
func Long() Action {
	return Edit("long", func(a *Answer) bool {
		if len(a.Body) == 0 {
			return false
		}
		a.Body = append(a.Body, "more"...)
		return true
	})
}

// WrongLength adds one to the length in the answer to a HEAD.
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

// NotThere says 404 of what is there.
func NotThere() Action {
	return Edit("not there", func(a *Answer) bool {
		if a.Status != http.StatusOK {
			return false
		}
		*a = Answer{Status: http.StatusNotFound, Header: http.Header{}}
		return true
	})
}

// What a listing consists of.
var (
	listed   = regexp.MustCompile(`(?s)<Contents>.*?</Contents>`)
	keyOf    = regexp.MustCompile(`<Key>[^<]*</Key>`)
	keyCount = regexp.MustCompile(`<KeyCount>\d+</KeyCount>`)
	modified = regexp.MustCompile(`<LastModified>([^<]*)</LastModified>`)
)

// editList changes the entries of a listing, and how many it says there are. It is
// false when there are none.
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

// ListMisses leaves one object out of a listing.
func ListMisses() Action {
	return editList(
		"list misses",
		func(entries []string) []string { return slices.Delete(entries, len(entries)/2, len(entries)/2+1) },
	)
}

// ListTwice lists one object twice.
func ListTwice() Action {
	return editList("list twice", func(entries []string) []string {
		return slices.Insert(entries, len(entries)/2, entries[len(entries)/2])
	})
}

// ListStray adds an object to a listing, with a key that is not below its prefix.
func ListStray(key string) Action {
	return editList("list stray", func(entries []string) []string {
		return append(entries, keyOf.ReplaceAllLiteralString(entries[len(entries)-1], "<Key>"+key+"</Key>"))
	})
}

// Meanwhile calls fn before the server is asked. Fn is called by many goroutines at
// once.
func Meanwhile(fn func(r *http.Request)) Action {
	return Action{name: "meanwhile", before: func(_ *Proxy, _ http.ResponseWriter, r *http.Request) bool {
		fn(r)
		return false
	}}
}

// StripRequest leaves a field out of the request, which it signs again.
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

// StripAnswer leaves fields out of the answer.
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

// Duplicate sends the request to the server twice and answers with what came
// last.
func Duplicate() Action { return Action{name: "duplicate", twice: true} }

func xmlError(code string) []byte {
	return fmt.Appendf(
		nil,
		"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code><Message>injected</Message></Error>",
		code,
	)
}

// Event is a request that came through the proxy.
type Event struct {
	Op           Op
	Key          string
	Action       string // empty: none
	ServerStatus int    // 0: it was not asked
}

// Proxy is a running proxy. It is safe for concurrent use.
type Proxy struct {
	server *httptest.Server
	target *url.URL
	next   *httputil.ReverseProxy
	closed chan struct{}

	mu     sync.Mutex
	rules  []*planned
	events []Event
	asked  func(Asked)
	age    time.Duration
}

// Asked is a request as the server gets it.
type Asked struct {
	Op  Op
	Key string
	// Deletes are the keys that it deletes, of a DeleteObject or DeleteObjects.
	Deletes []string
}

type planned struct {
	Rule
	seen, fired int
}

// New starts a proxy of the server at an address. It ends with the test.
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
			r.Out.Host = r.In.Host // it is signed
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

// URL returns the address to use instead of the server's.
func (p *Proxy) URL() string { return p.server.URL }

// Plan sets the rules in place of earlier ones. The first that concerns a
// request decides what happens to it.
func (p *Proxy) Plan(rules ...Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rules, p.events = nil, nil
	for _, r := range rules {
		if r.Times == 0 {
			r.Times = 1
		}
		p.rules = append(p.rules, &planned{Rule: r})
	}
}

// OnAsked calls fn with each request before the server gets it, twice for one that
// is sent twice. Fn is called by many goroutines at once. It is set before the
// first request, and outlasts Plan.
func (p *Proxy) OnAsked(fn func(Asked)) { p.asked = fn }

// Age has every listing say that its objects are older by so much. It is set before
// the first request, and outlasts Plan.
func (p *Proxy) Age(d time.Duration) { p.age = d }

// aged is a listing with its objects older by so much.
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

// Events returns what came through since the last Plan.
func (p *Proxy) Events() []Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.events)
}

// Count returns how many requests of an operation came since the last Plan.
func (p *Proxy) Count(op Op) int {
	n := 0
	for _, e := range p.Events() {
		if e.Op == op {
			n++
		}
	}
	return n
}

// Fired returns how many faults there were since the last Plan.
func (p *Proxy) Fired() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, r := range p.rules {
		n += r.fired
	}
	return n
}

// MustHaveFired fails the test for each rule without effect: a test of a fault
// that did not happen tests nothing.
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

// match returns the rule that concerns a request, or nil.
func (p *Proxy) match(op Op, key string) *planned {
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

func (p *Proxy) record(e Event, r *planned, fired bool) {
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
		// What comes of it the client may see before this returns.
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
		// The count must be right by the time the client has the answer.
		late := &lateWriter{ResponseWriter: w, first: func(fired bool) { p.record(e, rule, fired) }}
		late.send(rule.Action.after(p, late, r, answer))
	}
}

// lateWriter holds an answer back until it is known whether the fault fired,
// except for actions that take the connection over or send half.
type lateWriter struct {
	http.ResponseWriter
	first  func(fired bool)
	once   sync.Once
	status int
	body   bytes.Buffer
}

func (w *lateWriter) WriteHeader(status int) { w.status = status }

func (w *lateWriter) Write(b []byte) (int, error) { return w.body.Write(b) }

// Unwrap gives the connection away: what was held back is sent.
func (w *lateWriter) Unwrap() http.ResponseWriter {
	w.send(true)
	return w.ResponseWriter
}

func (w *lateWriter) send(fired bool) {
	w.once.Do(func() {
		w.first(fired)
		if w.status == 0 {
			return
		}
		w.ResponseWriter.WriteHeader(w.status)
		_, _ = w.ResponseWriter.Write(w.body.Bytes()) // the client may be gone
	})
}

// send asks the server.
func (p *Proxy) send(r *http.Request, body []byte) *Answer {
	if p.asked != nil {
		op, key := Classify(r)
		keys, err := deletes(op, key, body)
		if err != nil { // a request that cannot be reported is not made
			return &Answer{Status: http.StatusBadRequest, Header: http.Header{}, Body: xmlError("MalformedXML")}
		}
		p.asked(Asked{Op: op, Key: key, Deletes: keys})
	}
	out := r.Clone(r.Context())
	out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	rec := httptest.NewRecorder()
	p.next.ServeHTTP(rec, out)
	answer := &Answer{Status: rec.Code, Header: rec.Header().Clone(), Body: rec.Body.Bytes()}
	if op, _ := Classify(r); op == ListObjectsV2 && p.age != 0 {
		answer.Body = aged(answer.Body, p.age)
		answer.Header.Del("Content-Length") // as it turns out
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

// Resign signs a request that was changed on its way to a server, with the payload
// hash and the date that it carries.
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

// reset breaks the client's connection, so that it sees a reset and no end.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // closed all the same
	}
	_ = conn.Close()
}
