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

// Get implements [object.Store]. What is read to its end of a whole object has
// the checksum that the store keeps of it, or the read fails.
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
				f = unusable("the range from %d on is refused of %d bytes", offset, info.Size)
			}
		}
		return f
	})
	if f != nil {
		return nil, object.Info{}, s.error("get", key, f)
	}
	return body, info, nil
}

// empty is nothing of an object that must exist all the same.
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
		options = append(options, func(o *s3.Options) { o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired })
	}
	ctx, cancel := context.WithCancelCause(ctx)
	watch := time.AfterFunc(s.o.RequestTimeout, func() { cancel(errTimeout) })
	out, err := s.client.GetObject(ctx, in, options...)
	watch.Stop()
	if err != nil {
		f := timedOut(ctx, judge(err), s.o.RequestTimeout)
		cancel(nil)
		return nil, object.Info{}, f
	}
	info, want, f := checkGet(out, whole, offset, last)
	if f != nil {
		cancel(nil)
		_ = out.Body.Close() // nobody reads it
		return nil, object.Info{}, f
	}
	info.Key = key
	return &reader{body: out.Body, left: want, store: s, key: key, ctx: ctx, cancel: cancel, watch: watch}, info, nil
}

// checkGet says what is to be read of an answer, or what is wrong with it.
func checkGet(out *s3.GetObjectOutput, whole bool, offset, last int64) (info object.Info, want int64, f *failure) {
	if out.ContentLength == nil || *out.ContentLength < 0 {
		return info, 0, unusable("no Content-Length")
	}
	info.Size, want = *out.ContentLength, *out.ContentLength
	if !whole {
		var from, to, size int64
		if n, err := fmt.Sscanf(aws.ToString(out.ContentRange), "bytes %d-%d/%d", &from, &to, &size); err != nil || n != 3 {
			return info, 0, unusable("a range was asked for, and none is named")
		}
		if from != offset || to != min(last, size-1) || to-from+1 != want {
			return info, 0, unusable("another range than the one asked for, %q of %d bytes", clip(*out.ContentRange), want)
		}
		info.Size = size
	}
	info.ETag = bare(out.ETag)
	if info.ETag == "" || out.LastModified == nil {
		return info, 0, unusable("no ETag, or no Last-Modified")
	}
	info.ModTime = *out.LastModified
	return info, want, nil
}

// reader reads the body of an answer. It fails when that is shorter or longer
// than it said, does not have its checksum, or does not come.
type reader struct {
	body   io.ReadCloser
	left   int64 // bytes that must still come
	err    error // what every later Read returns
	store  *Store
	key    string
	ctx    context.Context //nolint:containedctx // of the answer that is being read
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
	// The checksum is compared at the end, which the last byte is not. Only then
	// is the last piece handed out.
	var more [1]byte
	switch m, err := r.next(more[:]); {
	case m > 0:
		r.err = r.fail(errors.New("there is more than was said"))
	case err == nil:
		r.err = r.fail(errors.New("the body does not end"))
	case !errors.Is(err, io.EOF):
		r.err = r.fail(err)
	default:
		r.err = io.EOF
		return n, io.EOF
	}
	return 0, r.err
}

// next reads, with the time that an attempt gets.
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
		f.detail = fmt.Sprintf("nothing came for %v", r.store.o.RequestTimeout)
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
	info.Checksum, info.SourceETag = sumOf(out), out.Metadata[sourceName]
	info.OpaqueETag = opaque(out.ServerSideEncryption, out.SSECustomerAlgorithm)
	return info, nil
}

// headed is what a store says of an object.
type headed struct {
	object.Info
	writer string // the id of the write that made it, empty if not of ours
}

func (s *Store) head(ctx context.Context, key string) (headed, *failure) {
	out, f := s.headOutput(ctx, key)
	if f != nil {
		return headed{}, f
	}
	return headed{Info: headInfo(key, out), writer: out.Metadata[writerName]}, nil
}

// headInfo is what every method says of an object.
func headInfo(key string, out *s3.HeadObjectOutput) object.Info {
	return object.Info{Key: key, Size: *out.ContentLength, ETag: bare(out.ETag), ModTime: *out.LastModified}
}

// headOutput returns an answer that has a length, an ETag and a time.
func (s *Store) headOutput(ctx context.Context, key string) (*s3.HeadObjectOutput, *failure) {
	out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.HeadObjectOutput, error) {
		return s.client.HeadObject(ctx, &s3.HeadObjectInput{
			Bucket: &s.o.Bucket, Key: s.key(key), ChecksumMode: types.ChecksumModeEnabled, ExpectedBucketOwner: s.owner,
		})
	})
	if f != nil {
		switch f.status {
		case http.StatusNotFound, http.StatusForbidden, http.StatusBadRequest:
			return nil, s.explain(ctx, key, f.status)
		}
		return nil, f
	}
	if out.ContentLength == nil || *out.ContentLength < 0 || bare(out.ETag) == "" || out.LastModified == nil {
		return nil, unusable("no Content-Length, ETag or Last-Modified")
	}
	return out, nil
}

// explain finds out what an error of a HEAD, which has no body, means: that
// there is no object and that there is no bucket look the same.
func (s *Store) explain(ctx context.Context, key string, status int) *failure {
	_, f := attempt(ctx, s, 0, func(ctx context.Context) (struct{}, error) {
		out, err := s.client.GetObject(ctx, &s3.GetObjectInput{
			Bucket: &s.o.Bucket, Key: s.key(key), ExpectedBucketOwner: s.owner, Range: aws.String("bytes=0-0"),
		}, func(o *s3.Options) { o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired })
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, out.Body.Close()
	})
	if f == nil || f.status == http.StatusRequestedRangeNotSatisfiable {
		return unusable("HEAD says HTTP %d of an object that can be read", status)
	}
	return f
}

// List implements [object.Store]. Names below the prefix that are no valid keys
// are passed over, as they are none of ours.
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
		last  string // key, in the bucket
		empty int    // pages
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
			if f := over(ctx); f != nil {
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
	objects []object.Info // by their names in the bucket
	next    *string       // token; nil: there are no more
	at      time.Time     // by the store's clock; zero: it did not say
}

// page reads a page of at most limit objects, 0 for the server's own limit, all
// of which must come after last.
func (s *Store) page(ctx context.Context, prefix string, token *string, last string, limit int32) (page, *failure) {
	in := &s3.ListObjectsV2Input{
		Bucket: &s.o.Bucket, Prefix: s.key(prefix), ContinuationToken: token, ExpectedBucketOwner: s.owner,
		EncodingType: types.EncodingTypeUrl, // not every key can be written in XML
	}
	if limit > 0 {
		in.MaxKeys = &limit
	}
	out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.ListObjectsV2Output, error) { return s.client.ListObjectsV2(ctx, in) })
	if f != nil {
		if errors.Is(f.kind, object.ErrNotFound) { // of a bucket?
			return page{}, unusable("there is no such key as a list")
		}
		return page{}, f
	}
	if out.IsTruncated == nil || aws.ToString(out.Name) != s.o.Bucket {
		return page{}, unusable("this is no list of the bucket")
	}
	if out.KeyCount != nil && int(*out.KeyCount) != len(out.Contents) {
		return page{}, unusable("%d objects are listed, %d are announced", len(out.Contents), *out.KeyCount)
	}
	var p page
	p.at, _ = awsmiddleware.GetServerTime(out.ResultMetadata)
	for _, o := range out.Contents {
		key := aws.ToString(o.Key)
		if out.EncodingType == types.EncodingTypeUrl {
			decoded, err := url.QueryUnescape(key)
			if err != nil {
				return page{}, unusable("key %q", clip(key))
			}
			key = decoded
		}
		switch {
		case !strings.HasPrefix(key, s.o.Prefix+prefix):
			return page{}, unusable("key %q does not begin with the prefix asked for", clip(key))
		case key <= last:
			f := unusable("key %q does not come after key %q", clip(key), clip(last))
			if key < last {
				f.kind = object.ErrMisconfigured // when the store answers so each time
				f.detail += "; the store lists objects out of key order, and snapshotd needs that order"
			}
			return page{}, f
		case o.Size == nil || *o.Size < 0 || bare(o.ETag) == "" || o.LastModified == nil:
			return page{}, unusable("key %q has no size, ETag or time", clip(key))
		}
		last = key
		p.objects = append(p.objects, object.Info{Key: key, Size: *o.Size, ETag: bare(o.ETag), ModTime: *o.LastModified})
	}
	if *out.IsTruncated {
		if aws.ToString(out.NextContinuationToken) == "" {
			return page{}, unusable("there is more, but no token to ask for it")
		}
		p.next = out.NextContinuationToken
	}
	return p, nil
}

// Now implements [object.Store]: the time at which the store answers. It costs
// a list of one object, whose errors say more than those of a HEAD.
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

// bare is an ETag without its quotes.
func bare(etag *string) string { return strings.Trim(aws.ToString(etag), `"`) }
