package bench

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

// Request is a request that a proxy has forwarded.
type Request struct {
	Method, Path string
	Begin, End   time.Time
	Bytes        int64 // length of its body
}

// Proxy is a proxy of an S3 server. It records every request and can delay
// requests and responses.
type Proxy struct {
	// Addr is host:port.
	Addr string

	delay atomic.Int64
	pace  atomic.Pointer[func(*http.Request) time.Duration]
	srv   *http.Server

	mu   sync.Mutex
	seen []Request
}

// StartProxy starts a proxy of the server at addr.
func StartProxy(ctx context.Context, addr string) (*Proxy, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	target := &url.URL{Scheme: "http", Host: addr}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host // the signature covers it
		},
		Transport: &http.Transport{
			MaxIdleConns: 512, MaxIdleConnsPerHost: 512, IdleConnTimeout: time.Minute, DisableCompression: true,
			ExpectContinueTimeout: time.Second,
		},
		BufferPool: &buffers{},
	}
	p := &Proxy{Addr: l.Addr().String()}
	p.srv = &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			begin := time.Now()
			if d := time.Duration(p.delay.Load()); d > 0 {
				t := time.NewTimer(d)
				defer t.Stop()
				select {
				case <-t.C:
				case <-r.Context().Done():
					return
				}
			}
			body := &counted{ReadCloser: r.Body}
			r.Body = body
			method, path := r.Method, r.URL.Path
			if pace := p.pace.Load(); pace != nil {
				w = &paced{ResponseWriter: w, ctx: r.Context(), at: begin.Add((*pace)(r))}
			}
			forward.ServeHTTP(w, r)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.seen = append(p.seen, Request{Method: method, Path: path, Begin: begin, End: time.Now(), Bytes: body.n.Load()})
		}),
	}
	go func() { _ = p.srv.Serve(l) }()
	return p, nil
}

// Delay sets the delay of every later request, before it is forwarded.
func (p *Proxy) Delay(d time.Duration) { p.delay.Store(int64(d)) }

// Pace sets the minimum time from the arrival of a later request to its response.
// The server works on the request meanwhile. Nil removes the minimum.
func (p *Proxy) Pace(pace func(*http.Request) time.Duration) {
	if pace == nil {
		p.pace.Store(nil)
		return
	}
	p.pace.Store(&pace)
}

// Drain returns the requests that ended since the last call.
func (p *Proxy) Drain() []Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.seen
	p.seen = nil
	return seen
}

// Close closes the proxy and its open requests.
func (p *Proxy) Close() { _ = p.srv.Close() }

// paced delays the start of a response until at, or the end of ctx.
type paced struct {
	http.ResponseWriter
	ctx context.Context //nolint:containedctx // the context of the request
	at  time.Time
}

// WriteHeader implements http.ResponseWriter.
func (w *paced) WriteHeader(status int) {
	t := time.NewTimer(time.Until(w.at))
	defer t.Stop()
	select {
	case <-t.C:
	case <-w.ctx.Done():
	}
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap supports http.ResponseController.
func (w *paced) Unwrap() http.ResponseWriter { return w.ResponseWriter }

type counted struct {
	io.ReadCloser
	n atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	c.n.Add(int64(n))
	return n, err
}

type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if buf, ok := b.pool.Get().(*[]byte); ok {
		return *buf
	}
	return make([]byte, 64<<10)
}

func (b *buffers) Put(buf []byte) { b.pool.Put(&buf) }
