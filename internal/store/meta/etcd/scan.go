package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Keys per page without streams: few at first, then as many as fit into pageBytes according
// to the previous page.
const (
	firstPage = 64
	pageLimit = 256
	pageBytes = 2 << 20
)

// nextPage returns the number of keys to request after a page of kvs.
func nextPage(kvs []meta.KeyValue) int {
	size := 1
	for _, kv := range kvs {
		size += len(kv.Value)
	}
	return min(max(len(kvs)*pageBytes/size, 1), pageLimit)
}

// errNoStream means that the server does not support RangeStream.
var errNoStream = errors.New("no range stream")

// Scan implements [meta.KV]. The server splits the stream into messages of about its request
// limit, 1.5 MiB, and waits for fn by gRPC's flow control.
func (c *Client) Scan(ctx context.Context, from, to string, revision int64, fn func([]meta.KeyValue) error) (int64,
	error,
) {
	if err := meta.CheckSpan(from, to); err != nil {
		return 0, err
	}
	if revision <= 0 {
		// A stream has one revision but returns it only at its end; pages need it first.
		var err error
		if revision, err = c.revision(ctx); err != nil {
			return 0, fmt.Errorf("scan %s: %w", from, err)
		}
	}
	err := c.scanStream(ctx, from, to, revision, fn)
	if errors.Is(err, errNoStream) {
		err = c.scanPages(ctx, from, to, revision, fn)
	}
	if err != nil {
		return 0, err
	}
	return revision, nil
}

// revision returns the newest revision, read linearizably.
func (c *Client) revision(ctx context.Context) (int64, error) {
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	resp, err := c.etcd.Get(rctx, c.key(noKey), clientv3.WithCountOnly())
	if err != nil {
		return 0, mapError(ctx, rctx, err)
	}
	return resp.Header.Revision, nil
}

// scanStream returns errNoStream, before any call of fn, if the server has no streams.
func (c *Client) scanStream(ctx context.Context, from, to string, revision int64,
	fn func([]meta.KeyValue) error,
) error {
	sctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Each step of the stream has a timeout: the connection and each chunk. The time of
	// fn does not count.
	stalled := fmt.Errorf("%w: no response for %v", meta.ErrUnavailable, c.o.RequestTimeout)
	guard := time.AfterFunc(c.o.RequestTimeout, func() { cancel(stalled) })
	defer guard.Stop()
	fail := func(err error) error {
		if context.Cause(sctx) == stalled { //nolint:errorlint // identity
			err = stalled
		} else {
			err = mapError(ctx, sctx, err)
		}
		return fmt.Errorf("scan %s at %d: %w", from, revision, err)
	}

	chunks, err := c.etcd.GetStream(requireLeader(sctx), c.key(from), c.keyTo(to, clientv3.WithRev(revision))...)
	if err != nil {
		return fail(err)
	}
	defer func() { // the client's goroutine blocks on the channel until it is read
		cancel(nil)
		for range chunks {
		}
	}()
	complete := false
	for chunk := range chunks {
		if err := chunk.Err(); err != nil {
			if status.Code(err) == codes.Unimplemented {
				return errNoStream
			}
			return fail(err)
		}
		complete = chunk.Header != nil // only the last one has it
		if kvs := c.kvs(chunk.Kvs); len(kvs) > 0 {
			guard.Stop()
			if err := fn(kvs); err != nil {
				return err
			}
			guard.Reset(c.o.RequestTimeout)
		}
	}
	if !complete {
		return fail(errors.New("stream ended early"))
	}
	return nil
}

// scanPages reads pages; each begins after the last key of the previous one.
func (c *Client) scanPages(ctx context.Context, from, to string, revision int64, fn func([]meta.KeyValue) error) error {
	for limit := firstPage; ; {
		res, err := c.Range(ctx, meta.Range{From: from, To: to, Revision: revision, Limit: limit})
		if err != nil {
			return fmt.Errorf("scan: %w", err)
		}
		if len(res.KVs) > 0 {
			if err := fn(res.KVs); err != nil {
				return err
			}
		}
		if !res.More {
			return nil
		}
		limit = nextPage(res.KVs)
		if from = res.KVs[len(res.KVs)-1].Key + "\x00"; from >= to {
			return nil // no key is left
		}
	}
}
