package s3

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// sourceName is the entry of an object's metadata that tells of which ETag the
// object was that it was copied from in parts. Stored: never rename.
const sourceName = "snapshotd-source-etag"

// maxDigest is the size in bytes up to which a source is read to see what its ETag is.
const maxDigest = 8 << 20

// copying is one call of Copy.
type copying struct {
	object.CopyRequest
	source, etag *string // as headers want them
	info         object.Info

	// Of a copy in parts.
	parts    int
	partSize int64
	meta     *s3.HeadObjectOutput // of the source
	tags     *string
	// doubt is set when the object may have been made without our knowing.
	doubt bool
	// stray is set when an upload may be open that we do not know of, late when a
	// part may yet arrive.
	stray bool
	late  atomic.Bool
}

// Copy implements [object.Store]. The server copies, in one request, or in parts
// at once. Of what From comes with, an ACL, a storage class and a lock are not
// copied; the target is encrypted as the options say, like any other write.
//
// A copy in parts costs three requests besides the parts and two to begin and
// end it. It leaves the tags out where the store does not let them be read or
// written, or has none.
func (s *Store) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if err := r.Check(); err != nil {
		return object.Info{}, err
	}
	for _, key := range []string{r.From, r.To} {
		if err := s.check(ctx, key); err != nil {
			return object.Info{}, err
		}
	}
	c := &copying{CopyRequest: r, source: s.copySource(r.From), etag: aws.String(`"` + r.SourceETag + `"`)}
	do := s.copyWhole
	if c.parts, c.partSize = r.Parts.Split(r.Size); c.parts > 0 {
		do = s.copyParts
	}
	if f := do(ctx, c); f != nil {
		if c.doubt && errors.Is(f.kind, object.ErrUnavailable) {
			f.detail += "; it may have been copied"
		}
		return object.Info{}, s.error("copy", r.From+" to "+r.To, f)
	}
	return c.info, nil
}

func (s *Store) copyWhole(ctx context.Context, c *copying) *failure {
	timeout := s.copyTimeout(c.Size)
	return s.retry(ctx, "copy", c.To, func() *failure {
		// The server goes on with a copy that is cut off, so an attempt outlives ctx by
		// as long as any other request: mostly the copy is over then. It does not wait
		// for the minutes that a large one may take, which would hold up the end of the
		// process; a copy that lands after that is the same bytes under the same key.
		longer, cancel := s.outlive(ctx)
		defer cancel()
		out, f := attemptFor(longer, timeout, func(ctx context.Context) (*s3.CopyObjectOutput, error) {
			return s.client.CopyObject(ctx, &s3.CopyObjectInput{
				Bucket: &s.o.Bucket, Key: s.key(c.To), CopySource: c.source, CopySourceIfMatch: c.etag,
				ServerSideEncryption: s.sse(), SSEKMSKeyId: s.kmsKey(),
				ExpectedBucketOwner: s.owner, ExpectedSourceBucketOwner: s.owner,
			})
		})
		if f != nil {
			c.doubt = c.doubt || !f.decided()
			return ofSource(f)
		}
		result := out.CopyObjectResult
		if result == nil {
			result = &types.CopyObjectResult{}
		}
		if bare(result.ETag) == "" {
			c.doubt = true
			return unusable("no ETag")
		}
		c.made(result.ETag, result.LastModified, out.ResultMetadata)
		if opaque(out.ServerSideEncryption, nil) {
			return nil
		}
		return s.sameContent(ctx, c)
	})
}

// sameContent compares the ETag of a copy in one request with that of the source.
// Both are MD5s mostly, so that a copy of another version shows without trust in the
// condition, which a server may have ceased to honour since it was probed. Where
// they differ it asks whether either is encrypted, and whether the source's ETag is
// its MD5: if not, the ETags prove nothing.
func (s *Store) sameContent(ctx context.Context, c *copying) *failure {
	if s.noMD5.Load() {
		return nil
	}
	source := object.Info{Size: c.Size, ETag: c.SourceETag}
	if likeness, _ := object.Compare(source, c.info); likeness != object.Altered {
		return nil
	}
	for _, key := range []string{c.From, c.To} {
		switch out, f := s.headOutput(ctx, key); {
		case f != nil:
			c.doubt = true
			return f
		case opaque(out.ServerSideEncryption, out.SSECustomerAlgorithm):
			return nil
		case key == c.From && bare(out.ETag) != c.SourceETag:
			return ignoredCondition(bare(out.ETag), c)
		}
	}
	switch is, f := s.isMD5(ctx, c); {
	case f != nil:
		c.doubt = true
		return f
	case !is:
		return nil
	}
	c.doubt = true
	return unusable("the copy has ETag %s, its source %s", clip(c.info.ETag), c.SourceETag)
}

// isMD5 says whether the source's ETag is known to be its MD5. It reads a source of up
// to maxDigest bytes, and notes if ETags of the server are no MD5s.
func (s *Store) isMD5(ctx context.Context, c *copying) (bool, *failure) {
	if c.Size > maxDigest {
		return false, nil
	}
	r, info, f := s.get(ctx, c.From, 0, -1)
	if f != nil {
		return false, f
	}
	if info.ETag != c.SourceETag {
		_ = r.Close() // what it holds is not used
		return false, ignoredCondition(info.ETag, c)
	}
	sum := md5.New() // an ETag, not a defence
	_, err := io.Copy(sum, r)
	if err := errors.Join(err, r.Close()); err != nil {
		return false, unusable("%s", clip(err.Error()))
	}
	if hex.EncodeToString(sum.Sum(nil)) == c.SourceETag {
		return true, nil
	}
	s.noMD5.Store(true)
	return false, nil
}

// opaque says whether an ETag is no MD5 even if it looks like one.
func opaque(sse types.ServerSideEncryption, customer *string) bool {
	return strings.HasPrefix(string(sse), "aws:kms") || aws.ToString(customer) != ""
}

// made notes what the answer says of the target.
func (c *copying) made(etag *string, at *time.Time, md middleware.Metadata) {
	c.info = object.Info{Key: c.To, Size: c.Size, ETag: bare(etag)}
	if at != nil {
		c.info.ModTime = *at
	} else if now, ok := awsmiddleware.GetServerTime(md); ok {
		c.info.ModTime = now
	} else {
		c.info.ModTime = time.Now() // roughly
	}
}

// ofSource gives a failure of a request that reads the source its meaning: the
// condition is the source's.
func ofSource(f *failure) *failure {
	if errors.Is(f.kind, object.ErrExists) {
		f.kind, f.retry = object.ErrSourceChanged, false
	}
	return f
}

// ofRange is ofSource for a range. Servers look whether it lies in the source
// before they look at the condition, and have different words for that.
func (s *Store) ofRange(ctx context.Context, c *copying, f *failure) *failure {
	if f.code != "InvalidArgument" && f.code != "InvalidRange" && f.status != http.StatusRequestedRangeNotSatisfiable {
		return ofSource(f)
	}
	switch out, missing := s.headOutput(ctx, c.From); {
	case missing != nil && errors.Is(missing.kind, object.ErrNotFound):
		return missing
	case missing == nil && (bare(out.ETag) != c.SourceETag || *out.ContentLength != c.Size):
		f.kind = object.ErrSourceChanged
	}
	return f
}

// copyParts copies the object in parts, and begins again once if the upload or a
// part is lost on the way.
func (s *Store) copyParts(ctx context.Context, c *copying) *failure {
	if f := s.describe(ctx, c); f != nil {
		return f
	}
	f := s.copyUpload(ctx, c)
	if f != nil && lost(f) && over(ctx) == nil {
		f = s.copyUpload(ctx, c)
	}
	if c.stray {
		s.sweep(ctx, c)
	}
	if f == nil && bare(c.meta.ETag) != c.SourceETag {
		return s.listedSource(ctx, c)
	}
	return f
}

// listedSource decides by a list where the HEAD of a source named another version
// than the one asked for, and its parts were copied all the same: either the HEAD was
// wrong, or the conditions are ignored.
func (s *Store) listedSource(ctx context.Context, c *copying) *failure {
	var p page
	f := s.retry(ctx, "list", c.From, func() (f *failure) {
		p, f = s.page(ctx, c.From, nil, "", 1)
		return f
	})
	switch {
	case f != nil:
		c.doubt = true
		return f
	case len(p.objects) == 0 || p.objects[0].Key != *s.key(c.From):
		return &failure{kind: object.ErrSourceChanged, detail: "it is not listed any more"}
	case p.objects[0].ETag != c.SourceETag:
		return ignoredCondition(p.objects[0].ETag, c)
	}
	return nil
}

// ignoredCondition is that a copy was made of an object that is not the version
// asked for.
func ignoredCondition(etag string, c *copying) *failure {
	return &failure{kind: object.ErrSourceChanged, detail: fmt.Sprintf(
		"the store ignored the condition and copied ETag %s, not %s", clip(etag), c.SourceETag)}
}

// lost says whether a failure is that of an upload that cannot be completed any
// more, while another may be.
func lost(f *failure) bool {
	return f.code == "NoSuchUpload" || f.code == "InvalidPart" || f.code == "InvalidPartOrder"
}

// describe finds out what the target is to have besides the content.
func (s *Store) describe(ctx context.Context, c *copying) *failure {
	f := s.retry(ctx, "head", c.From, func() (f *failure) {
		c.meta, f = s.headOutput(ctx, c.From)
		return f
	})
	if f != nil {
		return f
	}
	if *c.meta.ContentLength != c.Size {
		return &failure{kind: object.ErrSourceChanged, detail: fmt.Sprintf("it has %d bytes, not %d", *c.meta.ContentLength, c.Size)}
	}
	f = s.retry(ctx, "read tags of", c.From, func() *failure {
		out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.GetObjectTaggingOutput, error) {
			return s.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: &s.o.Bucket, Key: s.key(c.From), ExpectedBucketOwner: s.owner})
		})
		switch {
		case f != nil && (unsupported(f) || f.code == "AccessDenied" || f.code == "NoSuchTagSet" || f.code == "NoSuchTagSetError"):
			return nil
		case f != nil:
			return f
		case out.TagSet == nil:
			return unusable("this is no set of tags")
		}
		tags := url.Values{}
		for _, tag := range out.TagSet {
			tags.Add(aws.ToString(tag.Key), aws.ToString(tag.Value))
		}
		if len(tags) > 0 {
			c.tags = aws.String(strings.ReplaceAll(tags.Encode(), "+", "%20"))
		}
		return nil
	})
	return f
}

// copyUpload makes the object by one upload. Unless it succeeds it aborts it.
func (s *Store) copyUpload(ctx context.Context, c *copying) *failure {
	id, f := s.beginCopy(ctx, c)
	if f != nil {
		return f
	}
	parts, f := s.fillCopy(ctx, c, id)
	if f == nil {
		f = s.completeCopy(ctx, c, id, parts)
	}
	if f != nil {
		// Whatever the outcome: aborting what was completed does nothing.
		s.abortAfter(ctx, c.To, id)
		c.stray = c.stray || c.late.Load() // which may bring the upload back
	}
	return f
}

// outlive returns a context for copies and requests that belong to an upload: it is over
// the timeout of a request later than ctx. What is cut off a server may carry
// out all the same, and later than the abort that was to be the end of it.
func (s *Store) outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	return outliveBy(ctx, s.o.RequestTimeout)
}

// outliveBy returns a context that is over so much later than ctx.
func outliveBy(ctx context.Context, by time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(by, cancel) })
	return longer, func() {
		stop()
		cancel()
	}
}

func (s *Store) beginCopy(ctx context.Context, c *copying) (id string, f *failure) {
	in := &s3.CreateMultipartUploadInput{
		Bucket: &s.o.Bucket, Key: s.key(c.To), Metadata: maps.Clone(c.meta.Metadata), Tagging: c.tags,
		ContentType: c.meta.ContentType, ContentEncoding: c.meta.ContentEncoding, ContentLanguage: c.meta.ContentLanguage,
		ContentDisposition: c.meta.ContentDisposition, CacheControl: c.meta.CacheControl,
		ServerSideEncryption: s.sse(), SSEKMSKeyId: s.kmsKey(), ExpectedBucketOwner: s.owner,
		// No checksum: some servers take the whole source's for that of each part.
	}
	if in.Metadata == nil {
		in.Metadata = make(map[string]string, 1)
	}
	in.Metadata[sourceName] = c.SourceETag
	if at, err := http.ParseTime(aws.ToString(c.meta.ExpiresString)); err == nil {
		in.Expires = &at
	}
	longer, cancel := s.outlive(ctx)
	defer cancel()
	f = s.retry(ctx, "copy", c.To, func() *failure {
		out, f := attempt(longer, s, 0, func(ctx context.Context) (*s3.CreateMultipartUploadOutput, error) {
			return s.client.CreateMultipartUpload(ctx, in)
		})
		if f != nil && in.Tagging != nil && refusesTags(f) {
			in.Tagging = nil
			f.retry = true
		}
		if f == nil {
			if id = aws.ToString(out.UploadId); id == "" {
				f = unusable("no upload id")
			}
		}
		c.stray = c.stray || f != nil && !f.decided()
		return f
	})
	return id, f
}

// refusesTags says whether a request with tags was refused for a reason that may be
// the tags: the server does not know them, or the credentials may not write them.
func refusesTags(f *failure) bool {
	return unsupported(f) || f.decided() && (f.status == http.StatusBadRequest || f.status == http.StatusForbidden)
}

func (s *Store) fillCopy(ctx context.Context, c *copying, id string) ([]types.CompletedPart, *failure) {
	parts := make([]types.CompletedPart, c.parts)
	longer, cancel := s.outlive(ctx)
	defer cancel()
	// When a part fails no other is begun, and those under way come to their end.
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(partsInFlight)
	if c.InFlight > 0 {
		group.SetLimit(c.InFlight)
	}
	for i := range parts {
		parts[i].PartNumber = aws.Int32(int32(i + 1))
		group.Go(func() error {
			if f := s.copyPart(groupCtx, longer, c, id, &parts[i], int64(i)*c.partSize); f != nil {
				return partError{f}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		if end := over(ctx); end != nil {
			return nil, end
		}
		if p, ok := errors.AsType[partError](err); ok {
			return nil, p.failure
		}
	}
	return parts, nil
}

// copyPart copies a part. It makes no attempt when ctx is over; those that it
// makes end with longer.
func (s *Store) copyPart(ctx, longer context.Context, c *copying, id string, p *types.CompletedPart, offset int64) *failure {
	size := min(c.partSize, c.Size-offset)
	in := &s3.UploadPartCopyInput{
		Bucket: &s.o.Bucket, Key: s.key(c.To), UploadId: &id, PartNumber: p.PartNumber, CopySource: c.source, CopySourceIfMatch: c.etag,
		ExpectedBucketOwner: s.owner, ExpectedSourceBucketOwner: s.owner,
	}
	if c.parts > 1 { // of a small source S3 copies no ranges
		in.CopySourceRange = aws.String(fmt.Sprintf("bytes=%d-%d", offset, offset+size-1))
	}
	timeout := s.copyTimeout(size)
	return s.retry(ctx, "copy", c.To, func() *failure {
		out, f := attemptFor(longer, timeout, func(ctx context.Context) (*s3.UploadPartCopyOutput, error) {
			return s.client.UploadPartCopy(ctx, in)
		})
		if f != nil && f.status == 0 {
			c.late.Store(true)
		}
		switch {
		case f != nil && f.code == "NoSuchUpload":
			return &failure{kind: object.ErrUnavailable, status: f.status, code: f.code, detail: fmt.Sprintf("part %d: the upload is gone", *p.PartNumber)}
		case f != nil:
			f.detail = fmt.Sprintf("part %d: %s", *p.PartNumber, f.detail)
			return s.ofRange(ctx, c, f)
		case out.CopyPartResult == nil || bare(out.CopyPartResult.ETag) == "":
			return unusable("part %d has no ETag", *p.PartNumber)
		}
		p.ETag = out.CopyPartResult.ETag
		return nil
	})
}

// completeCopy makes the object of the parts. Where it is open whether that has
// happened it looks at the target: one that is a copy of that source in parts is
// right, whichever attempt made it.
func (s *Store) completeCopy(ctx context.Context, c *copying, id string, parts []types.CompletedPart) *failure {
	timeout := s.copyTimeout(c.Size)
	longer, cancel := s.outlive(ctx)
	defer cancel()
	f := s.retry(ctx, "copy", c.To, func() *failure {
		out, f := attemptFor(longer, timeout, func(ctx context.Context) (*s3.CompleteMultipartUploadOutput, error) {
			return s.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
				Bucket: &s.o.Bucket, Key: s.key(c.To), UploadId: &id, ExpectedBucketOwner: s.owner,
				MultipartUpload: &types.CompletedMultipartUpload{Parts: parts},
			})
		})
		switch {
		case f == nil && bare(out.ETag) != "":
			c.made(out.ETag, nil, out.ResultMetadata)
			return wantChecksum(sumOf(c.meta), sumOfUpload(out))
		case f == nil:
			f = unusable("no ETag")
		case errors.Is(f.kind, object.ErrExists):
			return unusable("a condition failed that was not made")
		}
		c.doubt = c.doubt || !f.decided() // of no such upload: perhaps completed before
		return f
	})
	if f != nil && c.doubt && over(ctx) == nil && errors.Is(f.kind, object.ErrUnavailable) && s.copied(ctx, c) {
		return nil
	}
	return f
}

// copied says whether the target is there and right, and then notes it.
func (s *Store) copied(ctx context.Context, c *copying) bool {
	out, f := s.headOutput(ctx, c.To)
	if f != nil || *out.ContentLength != c.Size || out.Metadata[sourceName] != c.SourceETag || wantChecksum(sumOf(c.meta), sumOf(out)) != nil {
		return false
	}
	c.made(out.ETag, out.LastModified, out.ResultMetadata)
	return true
}

// wantChecksum compares the checksums of a source and of its copy, where they
// are of one type.
func wantChecksum(source, target string) *failure {
	kind, _, _ := strings.Cut(source, ":")
	if other, _, _ := strings.Cut(target, ":"); source == "" || kind != other || source == target {
		return nil
	}
	return &failure{kind: object.ErrUnavailable, detail: fmt.Sprintf("the copy has checksum %s, its source %s", clip(target), clip(source))}
}

// sumOf is the checksum of an object's whole content in the form of
// [object.Info], empty if the store keeps none.
func sumOf(out *s3.HeadObjectOutput) string {
	return wholeSum(out.ChecksumType, []algorithmSum{
		{types.ChecksumAlgorithmCrc64nvme, out.ChecksumCRC64NVME},
		{types.ChecksumAlgorithmSha256, out.ChecksumSHA256},
		{types.ChecksumAlgorithmSha1, out.ChecksumSHA1},
		{types.ChecksumAlgorithmCrc32c, out.ChecksumCRC32C},
		{types.ChecksumAlgorithmCrc32, out.ChecksumCRC32},
	})
}

// sumOfUpload is sumOf for the answer that completes an upload.
func sumOfUpload(out *s3.CompleteMultipartUploadOutput) string {
	return wholeSum(out.ChecksumType, []algorithmSum{
		{types.ChecksumAlgorithmCrc64nvme, out.ChecksumCRC64NVME},
		{types.ChecksumAlgorithmCrc32c, out.ChecksumCRC32C},
		{types.ChecksumAlgorithmCrc32, out.ChecksumCRC32},
	})
}

type algorithmSum struct {
	algorithm types.ChecksumAlgorithm
	text      *string
}

func wholeSum(kind types.ChecksumType, sums []algorithmSum) string {
	if kind == types.ChecksumTypeComposite {
		return ""
	}
	for _, s := range sums {
		// One of the parts has their number behind a dash, whatever the type says.
		if text := aws.ToString(s.text); text != "" && !strings.Contains(text, "-") {
			return string(s.algorithm) + ":" + text
		}
	}
	return ""
}

// copyTimeout is for an attempt that has the server copy so many bytes.
func (s *Store) copyTimeout(size int64) time.Duration {
	return copyPatience*s.o.RequestTimeout + time.Duration(size/copiedPerSec)*time.Second
}

// copySource is how the header of a copy names an object: each byte that might
// mean something is escaped, a plus above all, which is a space to some servers.
func (s *Store) copySource(key string) *string {
	const hex = "0123456789ABCDEF"
	name := s.o.Bucket + "/" + s.o.Prefix + key
	var b strings.Builder
	b.Grow(len(name) + 16)
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == '~', c == '/':
			b.WriteByte(c)
		default:
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
	return aws.String(b.String())
}

// sweep aborts the uploads to the target. It is for the one whose id the store
// has not told, and hits those of others that copy to the same key.
func (s *Store) sweep(ctx context.Context, c *copying) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
	defer cancel()
	if _, err := s.abortUploads(ctx, c.To, func(u upload) bool { return u.key == c.To }); err != nil {
		s.o.Log.Warn("an upload may have stayed open", zap.String("key", c.To), zap.Error(err))
	}
}
