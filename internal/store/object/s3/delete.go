package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Delete implements [object.Store]. It requests a response that names every key, because
// the quiet form is indistinguishable from an HTML page.
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	var (
		mu   sync.Mutex
		errs []error
	)
	failed := func(key string, err error) {
		mu.Lock()
		defer mu.Unlock()
		errs = append(errs, &object.DeleteError{Key: key, Err: err})
	}
	var batch, single []string
	seen := make(map[string]bool, len(keys))
	for _, key := range keys {
		if seen[key] {
			continue
		}
		seen[key] = true
		switch err := s.check(ctx, key); {
		case err != nil:
			failed(key, err)
		case strings.ContainsAny(key, "\ufffe\uffff"): // invalid in XML
			single = append(single, key)
		default:
			batch = append(batch, key)
		}
	}
	for part := range slices.Chunk(batch, maxDelete) {
		if s.noBatch.isSet() {
			single = append(single, part...)
			continue
		}
		left, f := s.deleteBatch(ctx, part, failed)
		if f != nil && refusesBatch(f) {
			if f.code != "" { // the page of a proxy proves nothing about the server
				s.noBatch.set()
			}
			single = append(single, left...)
			continue
		}
		if f == nil {
			f = unusable("the response does not name the key")
		}
		for _, key := range left {
			failed(key, s.error("delete", key, f))
		}
	}
	var group errgroup.Group
	group.SetLimit(deletesInFlight)
	for _, key := range single {
		group.Go(func() error {
			if f := s.deleteOne(ctx, key); f != nil {
				failed(key, s.error("delete", key, f))
			}
			return nil
		})
	}
	_ = group.Wait()
	return object.Join(errs...)
}

// unsupported reports whether the server does not support the request.
func unsupported(f *failure) bool {
	return f.code == "NotImplemented" || f.code == "MethodNotAllowed" ||
		f.status == http.StatusNotImplemented || f.status == http.StatusMethodNotAllowed
}

// refusesBatch reports whether the server does not support batch deletes. Keys are then
// deleted one by one for the lifetime of the flag. Denied and throttled requests do not
// count.
func refusesBatch(f *failure) bool {
	if unsupported(f) {
		return true
	}
	switch f.status {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusLengthRequired, http.StatusUnsupportedMediaType:
		return !f.retry && !errors.Is(f.kind, object.ErrDenied) && f.code != "NoSuchBucket"
	}
	return false
}

// requiresContentMD5 reports whether the server requires the header Content-MD5.
func requiresContentMD5(f *failure) bool {
	return f.status == http.StatusBadRequest &&
		(f.code == "MissingContentMD5" || strings.Contains(strings.ToLower(f.detail), "content-md5"))
}

// deleteBatch deletes keys with one request, and with further ones for those that failed
// temporarily. It calls failed for keys that failed permanently, and returns the keys with
// an unknown result together with the failure.
func (s *Store) deleteBatch(
	ctx context.Context, keys []string, failed func(string, error),
) (left []string, f *failure) {
	left = keys
	f = s.retry(ctx, "delete", fmt.Sprintf("%s and %d more", keys[0], len(keys)-1), func() *failure {
		withMD5 := s.requiresMD5.Load()
		options := func(o *s3.Options) {
			if withMD5 {
				o.APIOptions = append(slices.Clone(o.APIOptions), smithyhttp.AddContentChecksumMiddleware)
			}
		}
		objects := make([]types.ObjectIdentifier, len(left))
		for i, key := range left {
			objects[i].Key = s.key(key)
		}
		out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.DeleteObjectsOutput, error) {
			return s.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{
				Bucket: &s.o.Bucket, ExpectedBucketOwner: s.owner,
				Delete: &types.Delete{Objects: objects, Quiet: aws.Bool(false)},
			}, options)
		})
		switch {
		case f != nil && !withMD5 && requiresContentMD5(f):
			s.requiresMD5.Store(true)
			f.retry = true
			return f
		case f != nil && errors.Is(f.kind, object.ErrNotFound):
			return unusable("NoSuchKey for a list of keys")
		case f != nil:
			return f
		}
		results := make(map[string]*failure, len(left))
		for _, d := range out.Deleted {
			results[aws.ToString(d.Key)] = nil
		}
		for _, e := range out.Errors {
			results[aws.ToString(e.Key)] = classifyDelete(aws.ToString(e.Code), aws.ToString(e.Message))
		}
		var pending []string
		for _, key := range left {
			switch result, ok := results[*s.key(key)]; {
			case !ok:
				f = unusable("the response does not name every key")
				pending = append(pending, key)
			case result == nil:
			case result.retry:
				f = result
				pending = append(pending, key)
			default:
				failed(key, s.error("delete", key, result))
			}
		}
		left = pending
		return f
	})
	return left, f
}

// classifyDelete classifies the error of one key of a batch; nil: the object is deleted.
func classifyDelete(code, message string) *failure {
	m, known := meaningOf(code, message)
	if known && errors.Is(m.kind, object.ErrNotFound) {
		return nil
	}
	f := &failure{kind: object.ErrUnavailable, code: code, detail: clip(code + ": " + message)}
	if known {
		f.kind, f.retry = m.kind, m.retry
		f.detail += m.todo
	}
	return f
}

func (s *Store) deleteOne(ctx context.Context, key string) *failure {
	return s.retry(ctx, "delete", key, func() *failure {
		out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.DeleteObjectOutput, error) {
			return s.client.DeleteObject(ctx, &s3.DeleteObjectInput{
				Bucket: &s.o.Bucket, Key: s.key(key), ExpectedBucketOwner: s.owner,
			})
		})
		if f == nil {
			raw, ok := awsmiddleware.GetRawResponse(out.ResultMetadata).(*smithyhttp.Response)
			if ok && raw.StatusCode == http.StatusNoContent {
				return nil
			}
			// S3 returns 204. For any other status, check that the object is gone.
			if _, f = s.head(ctx, key); f == nil {
				return unusable("the object still exists")
			}
		}
		if errors.Is(f.kind, object.ErrNotFound) {
			return nil
		}
		return f
	})
}
