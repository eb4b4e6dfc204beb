// Package s3 implements [object.Store] on a bucket of S3 or of a compatible server.
//
// The package rejects responses without their mandatory content: an ETag, a length, a
// range, the keys that were deleted. A write whose response was lost or unusable may have
// happened. Therefore every write stores a unique id in its object's metadata, and a
// repeat that finds an existing object compares that id.
//
// The SDK makes single attempts. Deadlines, pauses and the retry budget are implemented
// here, and one table in errors.go classifies all errors. Redirects are not followed, and
// proxy settings of the environment are ignored.
//
// Large objects are written in parts. Failed uploads are aborted. If the response with the
// id of an upload is lost, the upload stays open, so the bucket should have a lifecycle
// rule that aborts incomplete uploads after a few days. A copy in parts searches for such
// an upload, which requires the permission to list uploads.
package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Limits of S3 and of this package.
const (
	maxParts        = 10_000
	minPartSize     = 5 << 20
	maxDelete       = 1000      // keys in one request
	maxPrefixBytes  = 512       // the rest of object.MaxKeyBytes is for keys
	maxObjectSize   = 1 << 50   // bytes; larger than the limit of any store
	minBytesPerSec  = 128 << 10 // slower uploads time out
	maxEmptyPages   = 100       // consecutive pages of a list
	partsInFlight   = 4         // of one object
	deletesInFlight = 16        // of single keys, and of uploads to abort
	cleanUpTimeout  = 10 * time.Second
	maxAborts       = 5        // of one upload that stays listed
	copyPatience    = 3        // factor of the request timeout
	copiedPerSec    = 10 << 20 // bytes; slower copies time out
	maxPause        = 5 * time.Second
	ratePatience    = 30 * time.Second // with a store that limits the writes per key and second
	maxRetryAfter   = 10 * time.Second

	handshakeTimeout = 5 * time.Second
)

// Secret is a string that prints as "[redacted]" in every format.
type Secret string

const redacted = "[redacted]"

// String implements fmt.Stringer.
func (Secret) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (Secret) GoString() string { return redacted }

// MarshalText implements encoding.TextMarshaler, for JSON and YAML.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Options configure a store.
type Options struct {
	// Bucket is the bucket's name. Access points are not supported.
	Bucket string
	// Prefix precedes every key. It is empty or ends in "/", and reduces the maximum
	// length of keys.
	Prefix string
	// Region is the bucket's region. Default: "us-east-1".
	Region string
	// Endpoint is the address of a server other than AWS: http://host:port or
	// https://host:port, with an optional path. Default: that of AWS in the region.
	Endpoint string
	// PathStyle puts the bucket into the path instead of the host name. Most servers
	// other than AWS need it.
	PathStyle bool

	// AccessKeyID, SecretAccessKey and SessionToken are the credentials. Without
	// AccessKeyID the SDK searches the environment, the shared files, and the roles of
	// the pod and of the machine.
	AccessKeyID     string
	SecretAccessKey Secret
	SessionToken    Secret

	// ReadKeys, if not nil, replaces the three fields above. The store calls it once a
	// minute and after the server refuses a credential. If it fails, the store keeps
	// the last credentials.
	ReadKeys func() (Keys, error)

	// CAFile is a PEM file of authorities for the server's certificate, in addition to
	// those of the system.
	CAFile string
	// SSE is the server-side encryption of written objects: "" for the bucket's default,
	// "AES256" or "aws:kms".
	SSE string
	// KMSKeyID is the key for "aws:kms". Default: the account's own.
	KMSKeyID string
	// ExpectedBucketOwner is the account that must own the bucket. Default: any.
	ExpectedBucketOwner string

	// RequestTimeout bounds each attempt, and the wait for each piece of a body that is
	// read. Uploads get additional time by their size. Copies get three times the
	// timeout, and additional time by their size. Default: 10 s.
	RequestTimeout time.Duration
	// MaxAttempts is the number of attempts of a call. Default: 5.
	MaxAttempts int
	// RetryBudget is the maximum burst of retries of all calls together. It refills by
	// one per second, and by successful calls. Default: 100.
	RetryBudget int
	// Backoff is the maximum pause before the second attempt. It doubles with each
	// attempt, up to 5 s. Default: 100 ms.
	Backoff time.Duration
	// MultipartThreshold is the minimum size of objects that are written in parts.
	// Default: 64 MiB.
	MultipartThreshold int64
	// PartSize is the size of a part, at least 5 MiB. Objects of more than 10 000 parts
	// get larger parts. Default: 16 MiB.
	PartSize int64

	// WrapTransport, if not nil, decorates the transport of the requests to the store.
	WrapTransport func(http.RoundTripper) http.RoundTripper

	// Log receives a line for each retry. Default: none.
	Log *zap.Logger
}

// bucketName matches all bucket names that S3 accepts or accepted in the past.
var bucketName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$`)

// Validate returns all errors together. It reads no file.
func (o Options) Validate() error {
	var errs []error
	addf := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !bucketName.MatchString(o.Bucket) {
		addf("bucket: invalid name %q", o.Bucket)
	}
	if err := object.CheckPrefix(o.Prefix); err != nil {
		addf("prefix: %w", err)
	} else if len(o.Prefix) > maxPrefixBytes {
		addf("prefix: %d bytes, at most %d", len(o.Prefix), maxPrefixBytes)
	}
	if o.Endpoint != "" {
		u, err := url.Parse(o.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil ||
			u.RawQuery != "" || u.Fragment != "" {
			addf("endpoint: is not http://host:port/path or https://host:port/path; the path may be empty")
		}
	}
	if strings.ContainsAny(o.Region, " \t\r\n/:@?#") {
		addf("region: invalid name %q", o.Region)
	}
	switch {
	case o.AccessKeyID != "" && o.SecretAccessKey == "":
		addf("secret access key: missing; an access key id requires it")
	case o.AccessKeyID == "" && (o.SecretAccessKey != "" || o.SessionToken != ""):
		addf("access key id: missing; a secret access key or session token requires it")
	}
	if o.SSE != "" && o.SSE != "AES256" && o.SSE != "aws:kms" {
		addf(`sse: %q is not "AES256" or "aws:kms"`, o.SSE)
	}
	if o.KMSKeyID != "" && o.SSE != "aws:kms" {
		addf(`kms_key_id: needs sse "aws:kms"`)
	}
	if o.RequestTimeout < 0 || o.MaxAttempts < 0 || o.RetryBudget < 0 || o.Backoff < 0 || o.MultipartThreshold < 0 {
		addf("timeouts, attempts, budget and sizes must not be negative")
	}
	if o.PartSize != 0 && (o.PartSize < minPartSize || o.PartSize > 5<<30) {
		addf("part size: %d is not 5 MiB to 5 GiB", o.PartSize)
	}
	return errors.Join(errs...)
}

func (o Options) complete() Options {
	if o.Region == "" {
		o.Region = "us-east-1"
	}
	if o.RequestTimeout == 0 {
		o.RequestTimeout = 10 * time.Second
	}
	if o.MaxAttempts == 0 {
		o.MaxAttempts = 5
	}
	if o.RetryBudget == 0 {
		o.RetryBudget = 100
	}
	if o.Backoff == 0 {
		o.Backoff = 100 * time.Millisecond
	}
	if o.MultipartThreshold == 0 {
		o.MultipartThreshold = 64 << 20
	}
	if o.PartSize == 0 {
		o.PartSize = 16 << 20
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return o
}

// Store is an object store on a bucket. Use [Open].
type Store struct {
	o         Options
	client    *s3.Client
	transport *http.Transport
	budget    *budget
	keys      *keyring
	owner     *string
	// noBatch is set while the server is known to lack batch deletes.
	noBatch expiringFlag
	// requiresMD5 is set if the server requires Content-MD5 for batch deletes.
	requiresMD5 atomic.Bool
	// noMD5 is set if ETags of the server look like MD5s but are not.
	noMD5 atomic.Bool
	// unlistedOnce guards the warning that the server does not list uploads.
	unlistedOnce sync.Once
}

var _ object.Store = (*Store)(nil)

// flagLifetime is the lifetime of an expiringFlag: servers are upgraded, and gateways
// replaced.
const flagLifetime = time.Hour

// expiringFlag is a finding about a server that expires. It is safe for concurrent use.
type expiringFlag struct{ until atomic.Int64 }

func (l *expiringFlag) set()        { l.until.Store(time.Now().Add(flagLifetime).UnixNano()) }
func (l *expiringFlag) isSet() bool { return time.Now().UnixNano() < l.until.Load() }

// Open returns the store on an existing bucket. It loads the credentials but sends no
// request to the store; package probe checks the bucket. Call Close after use.
func Open(ctx context.Context, o Options) (*Store, error) {
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", o.Bucket, err)
	}
	o = o.complete()
	s := &Store{o: o, budget: newBudget(o.RetryBudget, time.Now)}
	if o.ExpectedBucketOwner != "" {
		s.owner = &o.ExpectedBucketOwner
	}
	var err error
	if s.transport, err = newTransport(o); err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", o.Bucket, err)
	}
	client := &http.Client{
		Transport:     s.transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	if o.WrapTransport != nil {
		client.Transport = o.WrapTransport(client.Transport)
	}
	s.keys, err = findCredentials(ctx, o, s.transport.TLSClientConfig)
	if err != nil {
		s.transport.CloseIdleConnections()
		return nil, fmt.Errorf("open bucket %s: %w", o.Bucket, err)
	}
	so := s3.Options{
		Region:       o.Region,
		Credentials:  s.keys.cache,
		HTTPClient:   client,
		HTTPSignerV4: &signer{},
		UsePathStyle: o.PathStyle,
		Retryer:      aws.NopRetryer{},
		// Both are off by default in a client made by s3.New.
		RequestChecksumCalculation:                aws.RequestChecksumCalculationWhenSupported,
		ResponseChecksumValidation:                aws.ResponseChecksumValidationWhenSupported,
		DisableLogOutputChecksumValidationSkipped: true,
		DisableMultiRegionAccessPoints:            true,
		DisableS3ExpressSessionAuth:               aws.Bool(true),
		APIOptions:                                []func(*middleware.Stack) error{noAcceptEncoding},
	}
	if o.Endpoint != "" {
		so.BaseEndpoint = aws.String(strings.TrimRight(o.Endpoint, "/"))
	}
	s.client = s3.New(so)
	return s, nil
}

// Close releases idle connections. It does not cancel calls under way.
func (s *Store) Close() error {
	s.transport.CloseIdleConnections()
	return nil
}

func newTransport(o Options) (*http.Transport, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if err := readCA(o, config); err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		DialContext: dialer.DialContext,
		// Each new connection trusts the current content of the CA file.
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			now := config.Clone()
			if err := readCA(o, now); err != nil {
				o.Log.Warn("CA file not reloaded, using its content at the start", zap.Error(err))
			}
			ctx, cancel := context.WithTimeout(ctx, dialer.Timeout+handshakeTimeout)
			defer cancel()
			return (&tls.Dialer{NetDialer: dialer, Config: now}).DialContext(ctx, network, addr)
		},
		TLSClientConfig: config,
		// Enough idle connections for 64 requests in flight.
		MaxIdleConns:          128,
		MaxIdleConnsPerHost:   128,
		IdleConnTimeout:       30 * time.Second,
		ExpectContinueTimeout: time.Second,
		// Lengths and checksums apply to the uncompressed body.
		DisableCompression: true,
		TLSNextProto:       map[string]func(string, *tls.Conn) http.RoundTripper{},
	}, nil
}

// readCA loads the authorities of CAFile into config.
func readCA(o Options, config *tls.Config) error {
	if o.CAFile == "" {
		return nil
	}
	pem, err := os.ReadFile(o.CAFile)
	if err != nil {
		return fmt.Errorf("ca file: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("ca file: %s holds no certificate", o.CAFile)
	}
	config.RootCAs = pool
	return nil
}

// noAcceptEncoding prevents the SDK from setting and signing the header Accept-Encoding.
// Front ends, such as those of GCS and of content networks, rewrite that header and so
// invalidate the signature. Without the header, servers do not compress.
func noAcceptEncoding(stack *middleware.Stack) error {
	const id = "DisableAcceptEncodingGzip"
	if _, found := stack.Finalize.Get(id); !found {
		return nil
	}
	_, err := stack.Finalize.Remove(id)
	return err
}

// key returns the name of an object in the bucket.
func (s *Store) key(key string) *string { return aws.String(s.o.Prefix + key) }

// check returns an error if key is invalid in this store or if ctx has ended.
func (s *Store) check(ctx context.Context, key string) error {
	if err := object.CheckKey(key); err != nil {
		return err
	}
	if n := len(s.o.Prefix) + len(key); n > object.MaxKeyBytes {
		return fmt.Errorf("%w: %d bytes with the store's prefix, at most %d", object.ErrInvalidKey, n, object.MaxKeyBytes)
	}
	return ctx.Err()
}

// timeout returns the timeout of an attempt that sends size bytes.
func (s *Store) timeout(size int64) time.Duration {
	return s.o.RequestTimeout + time.Duration(size/minBytesPerSec)*time.Second
}

func (s *Store) sse() types.ServerSideEncryption { return types.ServerSideEncryption(s.o.SSE) }

func (s *Store) kmsKey() *string {
	if s.o.KMSKeyID == "" {
		return nil
	}
	return &s.o.KMSKeyID
}
