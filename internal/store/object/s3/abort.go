package s3

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// upload is an open multipart upload.
type upload struct {
	key, id string
	at      time.Time // start of the upload; zero: unknown
}

// AbortUploads implements [object.Store]. Some servers, such as MinIO, list uploads only
// for a complete key; on those servers it finds none, and the server's expiry removes them.
// If the server does not support the request, it logs one warning and leaves all uploads
// to the server's expiry.
func (s *Store) AbortUploads(ctx context.Context, prefix string, before time.Time) (int, error) {
	if err := s.checkPrefix(ctx, prefix); err != nil {
		return 0, err
	}
	return s.abortUploads(ctx, prefix, func(u upload) bool {
		return before.IsZero() || u.at.Before(before) && !u.at.IsZero()
	})
}

// OldestUpload implements [object.Store]. A server that lists uploads only for a complete
// key has none to list.
func (s *Store) OldestUpload(ctx context.Context, prefix string) (oldest time.Time, err error) {
	if err := s.checkPrefix(ctx, prefix); err != nil {
		return time.Time{}, err
	}
	_, f := s.uploads(ctx, prefix, func(u upload) bool {
		if !u.at.IsZero() && (oldest.IsZero() || u.at.Before(oldest)) {
			oldest = u.at
		}
		return false // so that all pages are read
	})
	switch {
	case f != nil && unsupported(f):
		return time.Time{}, nil
	case f != nil:
		return time.Time{}, s.error("list uploads of", prefix, f)
	}
	return oldest, nil
}

func (s *Store) checkPrefix(ctx context.Context, prefix string) error {
	err := object.CheckPrefix(prefix)
	if err == nil && prefix != "" {
		err = s.check(ctx, strings.TrimSuffix(prefix, "/"))
	}
	return cmp.Or(err, ctx.Err())
}

// abortUploads aborts the matching uploads to keys with the prefix, until a list has none.
// It reads the next page only after a page without matches: some servers cannot continue a
// list from an aborted upload.
func (s *Store) abortUploads(ctx context.Context, prefix string, match func(upload) bool) (int, error) {
	aborted := make(map[string]int) // number of aborts by id
	for {
		uploads, f := s.uploads(ctx, prefix, match)
		if f != nil && unsupported(f) {
			s.unlistedOnce.Do(func() {
				s.o.Log.Warn("the store does not list incomplete uploads: set a lifecycle rule that aborts them",
					zap.String("bucket", s.o.Bucket))
			})
			return len(aborted), nil
		}
		if f != nil {
			return len(aborted), s.error("list uploads of", prefix, f)
		}
		if len(uploads) == 0 {
			return len(aborted), nil
		}
		var (
			mu    sync.Mutex
			errs  []error
			group errgroup.Group
		)
		group.SetLimit(deletesInFlight)
		for _, u := range uploads {
			group.Go(func() error {
				f := s.abort(ctx, u.key, u.id)
				mu.Lock()
				defer mu.Unlock()
				if f == nil {
					if aborted[u.id]++; aborted[u.id] < maxAborts {
						return nil
					}
					f = &failure{kind: object.ErrUnavailable, detail: "the upload remains listed after each abort"}
				}
				errs = append(errs, s.error("abort upload of", u.key, f))
				return nil
			})
		}
		_ = group.Wait()
		if err := object.Join(errs...); err != nil {
			return len(aborted), err
		}
	}
}

// uploads returns the matching uploads of the first page that has any.
func (s *Store) uploads(ctx context.Context, prefix string, match func(upload) bool) (uploads []upload, f *failure) {
	var key, id *string
	for {
		var p uploadPage
		f := s.retry(ctx, "list uploads of", prefix, func() (f *failure) {
			p, f = s.uploadPage(ctx, prefix, key, id)
			return f
		})
		if f != nil {
			return nil, f
		}
		for _, u := range p.uploads {
			if object.CheckKey(u.key) == nil && match(u) { // snapshotd writes no other keys
				uploads = append(uploads, u)
			}
		}
		if len(uploads) > 0 || !p.more {
			return uploads, nil
		}
		if aws.ToString(p.key) == "" ||
			aws.ToString(p.key) == aws.ToString(key) && aws.ToString(p.id) == aws.ToString(id) {
			return nil, &failure{kind: object.ErrUnavailable, detail: "the list does not advance"}
		}
		key, id = p.key, p.id
	}
}

// uploadPage is a part of a list of uploads.
type uploadPage struct {
	uploads []upload
	more    bool
	key, id *string // markers of the next page
}

func (s *Store) uploadPage(ctx context.Context, prefix string, key, id *string) (uploadPage, *failure) {
	out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.ListMultipartUploadsOutput, error) {
		return s.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{
			Bucket: &s.o.Bucket, Prefix: s.key(prefix), KeyMarker: key, UploadIdMarker: id, ExpectedBucketOwner: s.owner,
			EncodingType: types.EncodingTypeUrl,
		})
	})
	if f != nil {
		if errors.Is(f.kind, object.ErrNotFound) {
			return uploadPage{}, unusable("NoSuchKey for a list")
		}
		return uploadPage{}, f
	}
	if out.IsTruncated == nil || aws.ToString(out.Bucket) != s.o.Bucket {
		return uploadPage{}, unusable("not a list of the bucket's uploads")
	}
	decode := func(text *string) (string, error) {
		if out.EncodingType != types.EncodingTypeUrl {
			return aws.ToString(text), nil
		}
		return url.QueryUnescape(aws.ToString(text))
	}
	p := uploadPage{more: *out.IsTruncated, id: out.NextUploadIdMarker}
	next, err := decode(out.NextKeyMarker)
	if err != nil {
		return uploadPage{}, unusable("key marker %q is not URL-encoded", clip(*out.NextKeyMarker))
	}
	p.key = &next
	for _, u := range out.Uploads {
		name, err := decode(u.Key)
		if err != nil || !strings.HasPrefix(name, s.o.Prefix+prefix) || aws.ToString(u.UploadId) == "" {
			return uploadPage{}, unusable("key %q is outside the requested prefix, or has no upload id",
				clip(aws.ToString(u.Key)))
		}
		p.uploads = append(p.uploads, upload{
			key: strings.TrimPrefix(name, s.o.Prefix), id: *u.UploadId, at: aws.ToTime(u.Initiated),
		})
	}
	return p, nil
}

// abort aborts an upload. An unknown upload counts as aborted.
func (s *Store) abort(ctx context.Context, key, id string) *failure {
	return s.retry(ctx, "abort upload of", key, func() *failure {
		out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.AbortMultipartUploadOutput, error) {
			return s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{
				Bucket: &s.o.Bucket, Key: s.key(key), UploadId: &id, ExpectedBucketOwner: s.owner,
			})
		})
		switch {
		case f != nil && f.code == "NoSuchUpload":
			return nil
		case f != nil:
			return f
		}
		raw, ok := awsmiddleware.GetRawResponse(out.ResultMetadata).(*smithyhttp.Response)
		if ok && raw.StatusCode == http.StatusNoContent {
			return nil
		}
		// S3 returns 204. For any other status, check that the upload is gone.
		_, f = attempt(ctx, s, 0, func(ctx context.Context) (*s3.ListPartsOutput, error) {
			return s.client.ListParts(ctx, &s3.ListPartsInput{
				Bucket: &s.o.Bucket, Key: s.key(key), UploadId: &id, ExpectedBucketOwner: s.owner,
			})
		})
		switch {
		case f != nil && f.code == "NoSuchUpload":
			return nil
		case f != nil && unsupported(f), f == nil:
			return unusable("not the response of an abort")
		}
		return f
	})
}

// abortAfter aborts an upload even if ctx has ended.
func (s *Store) abortAfter(ctx context.Context, key, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
	defer cancel()
	if f := s.abort(ctx, key, id); f != nil {
		s.o.Log.Warn("upload may be left open", zap.String("key", key), zap.Error(s.error("abort upload of", key, f)))
	}
}
