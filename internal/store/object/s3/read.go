package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Get implements [object.Store]. A read of a whole object to its end fails unless the
// content has the checksum that the store keeps.
func (s *Store) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object.Info, error) {
	if err := s.check(ctx, key); err != nil {
		return nil, object.Info{}, err
	}
	if offset < 0 {
		return nil, object.Info{}, fmt.Errorf("get %s: negative offset %d", key, offset)
	}
	var (
		body io.ReadCloser
		info object.Info
	)
	f := s.retry(ctx, "get", key, func() (f *failure) {
		if length == 0 || offset >= maxObjectSize {
			body, info, f = s.empty(ctx, key)
			return f
		}
		body, info, f = s.get(ctx, key, offset, length)
		if f != nil && (f.code == "InvalidRange" || f.status == http.StatusRequestedRangeNotSatisfiable) {
			body, info, f = s.empty(ctx, key)
			if f == nil && offset < info.Size {
				f = unusable("range from %d refused, but the object has %d bytes", offset, info.Size)
			}
		}
		return f
	})
	if f != nil {
		return nil, object.Info{}, s.error("get", key, f)
	}
	return body, info, nil
}

// empty returns an empty body for an object that must exist.
func (s *Store) empty(ctx context.Context, key string) (io.ReadCloser, object.Info, *failure) {
	h, f := s.head(ctx, key)
	return http.NoBody, h.Info, f
}

func (s *Store) get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object.Info, *failure) {
	in := &s3.GetObjectInput{Bucket: &s.o.Bucket, Key: s.key(key), ExpectedBucketOwner: s.owner}
	whole := offset == 0 && length < 0
	last := int64(math.MaxInt64)
	if length >= 0 && length <= math.MaxInt64-offset {
		last = offset + length - 1
	}
	var options []func(*s3.Options)
	if !whole {
		r := fmt.Sprintf("bytes=%d-", offset)
		if last < maxObjectSize {
			r += fmt.Sprint(last)
		}
		in.Range = &r
		// Some servers send the whole object's checksum with a part of it.
		options = append(options, noChecksumValidation)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	watch := time.AfterFunc(s.o.RequestTimeout, func() { cancel(errTimeout) })
	out, err := s.client.GetObject(ctx, in, options...)
	watch.Stop()
	if err != nil {
		f := timedOut(ctx, classify(err), s.o.RequestTimeout)
		cancel(nil)
		return nil, object.Info{}, f
	}
	info, want, f := checkGet(out, whole, offset, last)
	if f != nil {
		cancel(nil)
		_ = out.Body.Close() // unread
		return nil, object.Info{}, f
	}
	info.Key = key
	return &reader{body: out.Body, left: want, store: s, key: key, ctx: ctx, cancel: cancel, watch: watch}, info, nil
}

// noChecksumValidation disables the SDK's check of a response's checksum.
func noChecksumValidation(o *s3.Options) {
	o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
}

// checkGet validates the response of a GET. want is the length of its body.
func checkGet(out *s3.GetObjectOutput, whole bool, offset, last int64) (info object.Info, want int64, f *failure) {
	if out.ContentLength == nil || *out.ContentLength < 0 {
		return info, 0, unusable("no Content-Length")
	}
	info.Size, want = *out.ContentLength, *out.ContentLength
	if !whole {
		var from, to, size int64
		if n, err := fmt.Sscanf(aws.ToString(out.ContentRange), "bytes %d-%d/%d", &from, &to, &size); err != nil || n != 3 {
			return info, 0, unusable("no Content-Range for a range request")
		}
		if from != offset || to != min(last, size-1) || to-from+1 != want {
			return info, 0, unusable("Content-Range %q with %d bytes does not match the request", clip(*out.ContentRange), want)
		}
		info.Size = size
	}
	info.ETag = unquote(out.ETag)
	if info.ETag == "" || out.LastModified == nil {
		return info, 0, unusable("no ETag or Last-Modified")
	}
	info.ModTime = *out.LastModified
	return info, want, nil
}

// reader reads the body of a response. It fails if the body is shorter or longer than
// its Content-Length, if its checksum does not match, or if no data arrives in time.
type reader struct {
	body   io.ReadCloser
	left   int64 // remaining bytes
	err    error // the result of later Reads
	store  *Store
	key    string
	ctx    context.Context //nolint:containedctx // of the response
	cancel context.CancelCauseFunc
	watch  *time.Timer
}

func (r *reader) Read(p []byte) (int, error) {
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	n := 0
	if r.left > 0 {
		var err error
		n, err = r.next(p[:min(int64(len(p)), r.left)])
		r.left -= int64(n)
		switch {
		case r.left > 0 && err == nil:
			return n, nil
		case r.left > 0:
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("%d bytes are missing: %w", r.left, io.ErrUnexpectedEOF)
			}
			r.err = r.fail(err)
			return n, r.err
		case err != nil && !errors.Is(err, io.EOF):
			r.err = r.fail(err)
			return 0, r.err
		}
	}
	// The SDK compares the checksum at EOF, which follows the last byte. The last piece
	// is returned after that.
	var more [1]byte
	switch m, err := r.next(more[:]); {
	case m > 0:
		r.err = r.fail(errors.New("body longer than Content-Length"))
	case err == nil:
		r.err = r.fail(errors.New("body without an end"))
	case !errors.Is(err, io.EOF):
		r.err = r.fail(err)
	default:
		r.err = io.EOF
		return n, io.EOF
	}
	return 0, r.err
}

// next reads a piece of the body within the timeout of an attempt.
func (r *reader) next(p []byte) (int, error) {
	r.watch.Reset(r.store.o.RequestTimeout)
	defer r.watch.Stop()
	for range 100 {
		if n, err := r.body.Read(p); n > 0 || err != nil {
			return n, err
		}
	}
	return 0, io.ErrNoProgress
}

func (r *reader) fail(err error) error {
	f := &failure{kind: object.ErrUnavailable, detail: clip(err.Error())}
	switch cause := context.Cause(r.ctx); {
	case errors.Is(cause, errTimeout):
		f.detail = fmt.Sprintf("no data for %v", r.store.o.RequestTimeout)
	case cause != nil:
		f = &failure{kind: r.ctx.Err()}
	}
	return r.store.error("read", r.key, f)
}

func (r *reader) Close() error {
	r.watch.Stop()
	r.cancel(nil)
	if r.err == nil {
		r.err = errors.New("read after close")
	}
	return r.body.Close()
}

// Head implements [object.Store].
func (s *Store) Head(ctx context.Context, key string) (object.Info, error) {
	if err := s.check(ctx, key); err != nil {
		return object.Info{}, err
	}
	var out *s3.HeadObjectOutput
	f := s.retry(ctx, "head", key, func() (f *failure) {
		out, f = s.headOutput(ctx, key)
		return f
	})
	if f != nil {
		return object.Info{}, s.error("head", key, f)
	}
	info := headInfo(key, out)
	info.Checksum, info.SourceETag = objectChecksum(out), out.Metadata[sourceName]
	info.OpaqueETag = opaque(out.ServerSideEncryption, out.SSECustomerAlgorithm)
	return info, nil
}

// headed is the result of a HEAD.
type headed struct {
	object.Info
	writer string // the id of the write that made the object; empty if unknown
}

func (s *Store) head(ctx context.Context, key string) (headed, *failure) {
	out, f := s.headOutput(ctx, key)
	if f != nil {
		return headed{}, f
	}
	return headed{Info: headInfo(key, out), writer: out.Metadata[writerName]}, nil
}

// headInfo returns the fields that every method returns.
func headInfo(key string, out *s3.HeadObjectOutput) object.Info {
	return object.Info{Key: key, Size: *out.ContentLength, ETag: unquote(out.ETag), ModTime: *out.LastModified}
}

// headOutput returns a response that has a length, an ETag and a time.
func (s *Store) headOutput(ctx context.Context, key string) (*s3.HeadObjectOutput, *failure) {
	out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.HeadObjectOutput, error) {
		return s.client.HeadObject(ctx, &s3.HeadObjectInput{
			Bucket: &s.o.Bucket, Key: s.key(key), ChecksumMode: types.ChecksumModeEnabled, ExpectedBucketOwner: s.owner,
		})
	})
	if f != nil {
		switch f.status {
		case http.StatusNotFound, http.StatusForbidden, http.StatusBadRequest:
			return nil, s.explainHead(ctx, key, f.status)
		}
		return nil, f
	}
	if out.ContentLength == nil || *out.ContentLength < 0 || unquote(out.ETag) == "" || out.LastModified == nil {
		return nil, unusable("no Content-Length, ETag or Last-Modified")
	}
	return out, nil
}

// explainHead explains a failed HEAD by a GET, because the response of a HEAD has no
// body: a missing object and a missing bucket look the same.
func (s *Store) explainHead(ctx context.Context, key string, status int) *failure {
	_, f := attempt(ctx, s, 0, func(ctx context.Context) (struct{}, error) {
		out, err := s.client.GetObject(ctx, &s3.GetObjectInput{
			Bucket: &s.o.Bucket, Key: s.key(key), ExpectedBucketOwner: s.owner, Range: aws.String("bytes=0-0"),
		}, noChecksumValidation)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, out.Body.Close()
	})
	if f == nil || f.status == http.StatusRequestedRangeNotSatisfiable {
		return unusable("HEAD failed with HTTP %d, but the object is readable", status)
	}
	return f
}

// List implements [object.Store]. It skips names that are invalid keys: snapshotd does
// not write them.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		err := object.CheckPrefix(prefix)
		if err == nil && prefix != "" {
			err = s.check(ctx, strings.TrimSuffix(prefix, "/"))
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			yield(object.Info{}, err)
			return
		}
		if f := s.list(ctx, prefix, func(info object.Info) bool { return yield(info, nil) }); f != nil {
			yield(object.Info{}, s.error("list", prefix, f))
		}
	}
}

func (s *Store) list(ctx context.Context, prefix string, yield func(object.Info) bool) *failure {
	var (
		token *string
		last  string // key in the bucket
		empty int    // consecutive empty pages
	)
	for {
		var p page
		f := s.retry(ctx, "list", prefix, func() (f *failure) {
			p, f = s.page(ctx, prefix, token, last, 0)
			return f
		})
		if f != nil {
			return f
		}
		for _, info := range p.objects {
			last = info.Key
			info.Key = strings.TrimPrefix(info.Key, s.o.Prefix)
			if object.CheckKey(info.Key) != nil {
				continue
			}
			if f := contextEnd(ctx); f != nil {
				return f
			}
			if !yield(info) {
				return nil
			}
		}
		if p.next == nil {
			return nil
		}
		empty++
		if len(p.objects) > 0 {
			empty = 0
		}
		if empty > maxEmptyPages || token != nil && *token == *p.next {
			return &failure{kind: object.ErrUnavailable, detail: "the list does not advance"}
		}
		token = p.next
	}
}

// page is a part of a list.
type page struct {
	objects []object.Info // with their names in the bucket
	next    *string       // continuation token; nil: the last page
	at      time.Time     // by the store's clock; zero: unknown
}

// page reads a page of at most limit objects, 0 for the server's limit. All of their
// names must be greater than last.
func (s *Store) page(ctx context.Context, prefix string, token *string, last string, limit int32) (page, *failure) {
	in := &s3.ListObjectsV2Input{
		Bucket: &s.o.Bucket, Prefix: s.key(prefix), ContinuationToken: token, ExpectedBucketOwner: s.owner,
		EncodingType: types.EncodingTypeUrl, // not every key can be written in XML
	}
	if limit > 0 {
		in.MaxKeys = &limit
	}
	out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.ListObjectsV2Output, error) {
		return s.client.ListObjectsV2(ctx, in)
	})
	if f != nil {
		if errors.Is(f.kind, object.ErrNotFound) { // a list names no key
			return page{}, unusable("NoSuchKey for a list")
		}
		return page{}, f
	}
	if out.IsTruncated == nil || aws.ToString(out.Name) != s.o.Bucket {
		return page{}, unusable("not a list of the bucket")
	}
	if out.KeyCount != nil && int(*out.KeyCount) != len(out.Contents) {
		return page{}, unusable("%d objects listed, KeyCount is %d", len(out.Contents), *out.KeyCount)
	}
	var p page
	p.at, _ = awsmiddleware.GetServerTime(out.ResultMetadata)
	for _, o := range out.Contents {
		key := aws.ToString(o.Key)
		if out.EncodingType == types.EncodingTypeUrl {
			decoded, err := url.QueryUnescape(key)
			if err != nil {
				return page{}, unusable("key %q is not URL-encoded", clip(key))
			}
			key = decoded
		}
		switch {
		case !strings.HasPrefix(key, s.o.Prefix+prefix):
			return page{}, unusable("key %q is outside the requested prefix", clip(key))
		case key <= last:
			f := unusable("key %q does not follow key %q", clip(key), clip(last))
			if key < last {
				f.kind = object.ErrMisconfigured // if each attempt gets such a list
				f.detail += "; the store lists objects out of key order, which snapshotd requires"
			}
			return page{}, f
		case o.Size == nil || *o.Size < 0 || unquote(o.ETag) == "" || o.LastModified == nil:
			return page{}, unusable("key %q has no size, ETag or time", clip(key))
		}
		last = key
		p.objects = append(p.objects, object.Info{Key: key, Size: *o.Size, ETag: unquote(o.ETag), ModTime: *o.LastModified})
	}
	if *out.IsTruncated {
		if aws.ToString(out.NextContinuationToken) == "" {
			return page{}, unusable("truncated list without a continuation token")
		}
		p.next = out.NextContinuationToken
	}
	return p, nil
}

// Now implements [object.Store] by the Date of a response. It lists one object, since
// the errors of a list are more specific than those of a HEAD.
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	var p page
	f := s.retry(ctx, "read clock of", "", func() (f *failure) {
		p, f = s.page(ctx, "", nil, "", 1)
		if f == nil && p.at.IsZero() {
			f = unusable("no Date")
		}
		return f
	})
	if f != nil {
		return time.Time{}, s.error("read clock of", "", f)
	}
	return p.at, nil
}

// unquote returns an ETag without its quotes.
func unquote(etag *string) string { return strings.Trim(aws.ToString(etag), `"`) }
