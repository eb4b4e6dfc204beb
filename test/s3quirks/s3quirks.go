// Package s3quirks has proxies that add quirks of other object stores to an S3
// server: a rate per key, lists out of order, missing operations, rewritten header
// fields. Tests use single quirks or a [Profile], a set of quirks of a kind of
// store.
//
// Package s3fault fails single requests; this package changes the behaviour of a
// server. A fault proxy may use a server with quirks.
package s3quirks

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// Request is a request with its body.
type Request struct {
	*http.Request
	Body []byte
	Op   s3fault.Op
	Key  string // without the bucket; empty for a request on the bucket
}

// Resign signs a changed request again.
func (r *Request) Resign() error {
	return s3fault.Resign(r.Request, s3test.AccessKeyID, s3test.SecretAccessKey)
}

// setBody replaces the body. The request must be signed again.
func (r *Request) setBody(body []byte) {
	sum := sha256.Sum256(body)
	r.Body, r.ContentLength = body, int64(len(body))
	r.Header.Set("Content-Length", strconv.Itoa(len(body)))
	r.Header.Set("X-Amz-Content-Sha256", hex.EncodeToString(sum[:]))
	r.Header.Del("Content-Md5")
	for name := range r.Header { // of the former body
		if strings.HasPrefix(name, "X-Amz-Checksum-") {
			r.Header.Del(name)
		}
	}
	r.Header.Del("X-Amz-Sdk-Checksum-Algorithm")
}

// Handler returns the response to a request.
type Handler func(*Request) *s3fault.Answer

// Quirk wraps the handler of a server. A quirk with state belongs to one [Server].
// The returned handler is safe for concurrent use.
type Quirk func(next Handler) Handler

// Server is an S3 server with quirks. It is safe for concurrent use.
type Server struct {
	server *httptest.Server
	handle Handler
}

// New starts a proxy with quirks of the S3 server at endpoint. The first quirk gets
// a request first. The proxy stops at the end of the test.
func New(tb testing.TB, endpoint string, quirks ...Quirk) *Server {
	tb.Helper()
	target, err := url.Parse(endpoint)
	if err != nil {
		tb.Fatal(err)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host
			r.Out.Host = r.In.Host // the signature covers it
		},
		Transport:    transport,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	s := &Server{handle: func(r *Request) *s3fault.Answer {
		out := r.Clone(r.Context())
		out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(r.Body)), int64(len(r.Body))
		rec := httptest.NewRecorder()
		proxy.ServeHTTP(rec, out)
		return &s3fault.Answer{Status: rec.Code, Header: rec.Header().Clone(), Body: rec.Body.Bytes()}
	}}
	for _, quirk := range slices.Backward(quirks) {
		s.handle = quirk(s.handle)
	}
	s.server = httptest.NewServer(s)
	tb.Cleanup(func() {
		s.server.Close()
		transport.CloseIdleConnections()
	})
	return s
}

// URL returns the address of the server.
func (s *Server) URL() string { return s.server.URL }

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	in := &Request{Request: r, Body: body}
	in.Op, in.Key = s3fault.Classify(r)
	answer := s.handle(in)
	maps.Copy(w.Header(), answer.Header)
	if r.Method != http.MethodHead { // the response to a HEAD has a length and no body
		w.Header().Set("Content-Length", strconv.Itoa(len(answer.Body)))
	}
	w.WriteHeader(answer.Status)
	_, _ = w.Write(answer.Body) // the client may be gone
}
