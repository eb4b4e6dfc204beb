package bench

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Request is one that went through a proxy.
type Request struct {
	Method, Path string
	Begin, End   time.Time
	Bytes        int64 // of its body
}

// Proxy stands in front of an S3 server. It notes every request, and holds it
// up for the configured time.
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
			r.Out.Host = r.In.Host // it is signed
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

// Delay holds every request up from now on.
func (p *Proxy) Delay(d time.Duration) { p.delay.Store(int64(d)) }

// Pace has no request answered from now on before so long after it came, while
// the server may work on it; nil has none wait.
func (p *Proxy) Pace(pace func(*http.Request) time.Duration) {
	if pace == nil {
		p.pace.Store(nil)
		return
	}
	p.pace.Store(&pace)
}

// Take returns the requests that ended since it was last called.
func (p *Proxy) Take() []Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.seen
	p.seen = nil
	return seen
}

// Close ends the proxy with the requests under way.
func (p *Proxy) Close() { _ = p.srv.Close() }

// Under returns those of list whose path has within it.
func Under(list []Request, within string) []Request {
	var some []Request
	for _, r := range list {
		if strings.Contains(r.Path, within) {
			some = append(some, r)
		}
	}
	return some
}

// paced begins an answer at a time, or when ctx is over.
type paced struct {
	http.ResponseWriter
	ctx context.Context //nolint:containedctx // of the request, as long as this
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

// Unwrap is for http.ResponseController.
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
