//go:build linux

package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/test/bench"
)

// memoryServer is the parent's end of an S3 server in memory.
type memoryServer struct {
	process *bench.Process
	at      string // host:port
}

func startMemoryS3(ctx context.Context, dir string) (*memoryServer, error) {
	p, err := bench.StartSelf(ctx, dir, "s3")
	if err != nil {
		return nil, err
	}
	s := &memoryServer{process: p}
	if _, err := fmt.Fscanln(p.Stdout, &s.at); err != nil {
		p.Stop()
		return nil, p.ExitError()
	}
	return s, nil
}

// delay holds every request up that comes after it has returned.
func (s *memoryServer) delay(d time.Duration) error {
	if _, err := fmt.Fprintln(s.process.Stdin, d); err != nil {
		return err
	}
	var same string
	_, err := fmt.Fscanln(s.process.Stdout, &same)
	return err
}

// memoryS3 is the server: as much of S3 as a restore asks for, without looking at
// signatures. Its standard input says how long each request is held up.
func memoryS3(ctx context.Context, in io.Reader, out io.Writer) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	h := &memoryHandler{store: memory.New(memory.Options{})}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
	fmt.Fprintln(out, l.Addr())
	go h.obey(in, out)
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

type memoryHandler struct {
	store *memory.Store
	delay atomic.Int64
}

// obey changes the delay by what it reads.
func (h *memoryHandler) obey(in io.Reader, out io.Writer) {
	var text string
	for {
		if _, err := fmt.Fscanln(in, &text); err != nil {
			return
		}
		d, err := time.ParseDuration(text)
		if err != nil {
			return
		}
		h.delay.Store(int64(d))
		fmt.Fprintln(out, d)
	}
}

// ServeHTTP implements http.Handler.
func (h *memoryHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if d := time.Duration(h.delay.Load()); d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
			return
		}
	}
	_, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	var err error
	switch {
	case key == "" && r.Method == http.MethodGet && r.URL.Query().Get("list-type") == "2":
		err = h.list(w, r)
	case key == "" && r.Method == http.MethodPost && r.URL.Query().Has("delete"):
		err = h.deleteMany(w, r)
	case key == "":
		http.Error(w, "not here", http.StatusNotImplemented)
	case r.Method == http.MethodPut && r.Header.Get("X-Amz-Copy-Source") != "":
		err = h.copy(w, r, key)
	case r.Method == http.MethodPut && r.URL.RawQuery != "" && r.URL.RawQuery != "x-id=PutObject":
		http.Error(w, "not here", http.StatusNotImplemented)
	case r.Method == http.MethodPut:
		err = h.put(w, r, key)
	case r.Method == http.MethodGet, r.Method == http.MethodHead:
		err = h.get(w, r, key)
	case r.Method == http.MethodDelete:
		if err = h.store.Delete(r.Context(), key); err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
	default:
		http.Error(w, "not here", http.StatusNotImplemented)
	}
	if err != nil {
		refuse(w, err)
	}
}

// refuse answers with an error.
func refuse(w http.ResponseWriter, err error) {
	status, code := http.StatusInternalServerError, "InternalError"
	switch {
	case errors.Is(err, object.ErrNotFound):
		status, code = http.StatusNotFound, "NoSuchKey"
	case errors.Is(err, object.ErrExists), errors.Is(err, object.ErrSourceChanged):
		status, code = http.StatusPreconditionFailed, "PreconditionFailed"
	}
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>refused</Message></Error>", code)
}

func (h *memoryHandler) put(w http.ResponseWriter, r *http.Request, key string) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	write := h.store.Put
	if r.Header.Get("If-None-Match") == "*" {
		write = h.store.Create
	}
	info, err := write(r.Context(), key, body)
	if err != nil {
		return err
	}
	w.Header().Set("ETag", `"`+info.ETag+`"`)
	return nil
}

func (h *memoryHandler) copy(w http.ResponseWriter, r *http.Request, to string) error {
	source, err := url.PathUnescape(r.Header.Get("X-Amz-Copy-Source"))
	if err != nil {
		return err
	}
	_, from, _ := strings.Cut(strings.TrimPrefix(source, "/"), "/")
	info, err := h.store.Head(r.Context(), from)
	if err != nil {
		return err
	}
	if etag := strings.Trim(r.Header.Get("X-Amz-Copy-Source-If-Match"), `"`); etag != "" && etag != info.ETag {
		return object.ErrSourceChanged
	}
	if info, err = h.store.Copy(
		r.Context(),
		object.CopyRequest{From: from, To: to, SourceETag: info.ETag, Size: info.Size},
	); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/xml")
	fmt.Fprintf(w, `<CopyObjectResult><LastModified>%s</LastModified><ETag>&quot;%s&quot;</ETag></CopyObjectResult>`,
		info.ModTime.UTC().Format(time.RFC3339), info.ETag)
	return nil
}

func (h *memoryHandler) get(w http.ResponseWriter, r *http.Request, key string) error {
	body, info, err := h.store.Get(r.Context(), key, 0, -1)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }() // of no consequence
	data, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	w.Header().Set("ETag", `"`+info.ETag+`"`)
	w.Header().Set("Last-Modified", info.ModTime.UTC().Format(http.TimeFormat))
	status := http.StatusOK
	if text := r.Header.Get("Range"); text != "" {
		var from, to int64
		if n, _ := fmt.Sscanf(text, "bytes=%d-%d", &from, &to); n < 2 {
			to = info.Size - 1
		}
		if to = min(to, info.Size-1); from > to {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return nil
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, info.Size))
		data, status = data[from:to+1], http.StatusPartialContent
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		_, _ = w.Write(data) // the client may be gone
	}
	return nil
}

type listed struct {
	XMLName     xml.Name `xml:"ListBucketResult"`
	Name        string
	Prefix      string
	KeyCount    int
	MaxKeys     int
	IsTruncated bool
	Contents    []listedObject
}

type listedObject struct {
	Key          string
	LastModified string
	ETag         string
	Size         int64
}

// list answers with everything in one page, or with a first part of it.
func (h *memoryHandler) list(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	most, err := strconv.Atoi(q.Get("max-keys"))
	if err != nil {
		most = 1 << 20
	}
	l := listed{Name: bucket, Prefix: q.Get("prefix"), MaxKeys: most}
	for info, err := range h.store.List(r.Context(), q.Get("prefix")) {
		if err != nil {
			return err
		}
		if len(l.Contents) == most {
			break
		}
		l.Contents = append(
			l.Contents,
			listedObject{info.Key, info.ModTime.UTC().Format(time.RFC3339), `"` + info.ETag + `"`, info.Size},
		)
	}
	l.KeyCount = len(l.Contents)
	w.Header().Set("Content-Type", "application/xml")
	return xml.NewEncoder(w).Encode(l)
}

func (h *memoryHandler) deleteMany(w http.ResponseWriter, r *http.Request) error {
	var want struct {
		Object []struct{ Key string }
	}
	if err := xml.NewDecoder(r.Body).Decode(&want); err != nil {
		return err
	}
	type deleted struct{ Key string }
	var done struct {
		XMLName xml.Name `xml:"DeleteResult"`
		Deleted []deleted
	}
	for _, o := range want.Object {
		if err := h.store.Delete(r.Context(), o.Key); err != nil {
			return err
		}
		done.Deleted = append(done.Deleted, deleted{o.Key})
	}
	w.Header().Set("Content-Type", "application/xml")
	return xml.NewEncoder(w).Encode(done)
}
