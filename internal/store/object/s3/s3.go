// Package s3 is an [object.Store] on a bucket of S3, or of any server that
// speaks its protocol.
//
// No answer is believed that does not carry what it must: an ETag, a length, a
// range, the very keys that were to be deleted. A write whose answer was lost
// or is of no use may have happened, so every write marks its object with an
// id of its own, and a repeated one that finds the key taken looks whose it is.
//
// The SDK makes one attempt at a time. Deadlines, pauses and the budget of
// retries are this package's: what each error means is in one table, in
// errors.go. Redirects are not followed and proxies of the environment not used.
//
// Large objects are written in parts. An upload that failed is aborted; one
// whose very first answer was lost is known to nobody, so the bucket should
// have a lifecycle rule that aborts incomplete uploads after a few days. A copy
// in parts looks for it, which asks for the right to list uploads.
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

// The bounds that S3 sets, and ours.
const (
	maxParts       = 10_000
	minPartSize    = 5 << 20
	maxDelete      = 1000      // keys in one request
	maxPrefixBytes = 512       // what is left is for keys
	maxObjectSize  = 1 << 50   // bytes; beyond any store's
	minBytesPerSec = 128 << 10 // a body slower than that is given up
	maxEmptyPages  = 100       // of a list, one after another
	partsInFlight  = 4         // of one object
	deletesAtOnce  = 16        // where keys are deleted one by one
	cleanUpTimeout = 10 * time.Second
	maxAborts      = 5        // of one upload that stays
	copyPatience   = 3        // times the timeout of a request
	copiedPerSec   = 10 << 20 // bytes; a copy slower than that is given up
	maxPause       = 5 * time.Second
	ratePatience   = 30 * time.Second // with a store that takes so many writes of one key in a second
	maxRetryAfter  = 10 * time.Second

	handshakeTimeout = 5 * time.Second
)

// Secret is a text that prints as "[redacted]" in whatever form.
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
	// Bucket is the bucket's name. An access point is none.
	Bucket string
	// Prefix is in front of every key. It is empty or ends in "/", and takes of
	// the length that a key may have.
	Prefix string
	// Region is the bucket's. Default: "us-east-1".
	Region string
	// Endpoint is the address of another server than AWS, as http://host:port or
	// https://host:port, with a path where the server has one. Default: that of AWS
	// in the region.
	Endpoint string
	// PathStyle puts the bucket into the path and not into the host's name. Most
	// servers other than AWS need it.
	PathStyle bool

	// AccessKeyID, SecretAccessKey and SessionToken are the credentials. Without
	// AccessKeyID they are what the SDK finds: in the environment, in the shared
	// files, of the pod or of the machine.
	AccessKeyID     string
	SecretAccessKey Secret
	SessionToken    Secret

	// ReadKeys, when it is not nil, returns the credentials in place of the three
	// above. The store calls it once a minute and when the server refuses a
	// credential, and keeps the last ones when it fails.
	ReadKeys func() (Keys, error)

	// CAFile is a PEM file of who may sign the server's certificate, besides
	// those that the system trusts.
	CAFile string
	// SSE is how the store encrypts what is written: "", which leaves it to the
	// bucket, "AES256" or "aws:kms".
	SSE string
	// KMSKeyID is the key for "aws:kms". Default: the account's own.
	KMSKeyID string
	// ExpectedBucketOwner is the account that must own the bucket. Default: any.
	ExpectedBucketOwner string

	// RequestTimeout bounds each attempt, and the wait for each piece of a body
	// that is read. An attempt that sends a body gets more, by its size, and one
	// that has the server copy three times as much and more by its size. Default:
	// 10 s.
	RequestTimeout time.Duration
	// MaxAttempts is how often a call is tried. Default: 5.
	MaxAttempts int
	// RetryBudget is how many retries all calls together may make in one go. It
	// refills by one a second, and with success. Default: 100.
	RetryBudget int
	// Backoff is the pause before the second attempt at most; each later one may
	// be twice as long, up to 5 s. Default: 100 ms.
	Backoff time.Duration
	// MultipartThreshold is the size from which on an object is written in parts.
	// Default: 64 MiB.
	MultipartThreshold int64
	// PartSize is the size of a part, at least 5 MiB. It grows with objects of
	// more than 10 000 parts. Default: 16 MiB.
	PartSize int64

	// WrapTransport, when it is not nil, decorates the transport of the requests to
	// the store.
	WrapTransport func(http.RoundTripper) http.RoundTripper

	// Log gets a line for each attempt that is made again. Default: none.
	Log *zap.Logger
}

// bucketName is what S3 allows, and has allowed.
var bucketName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$`)

// Validate returns all mistakes at once. It reads no file.
func (o Options) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !bucketName.MatchString(o.Bucket) {
		wrong("bucket: %q is not the name of one", o.Bucket)
	}
	if err := object.CheckPrefix(o.Prefix); err != nil {
		wrong("prefix: %w", err)
	} else if len(o.Prefix) > maxPrefixBytes {
		wrong("prefix: %d bytes, at most %d", len(o.Prefix), maxPrefixBytes)
	}
	if o.Endpoint != "" {
		u, err := url.Parse(o.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil ||
			u.RawQuery != "" || u.Fragment != "" {
			wrong("endpoint: is not http://host:port/path or https://host:port/path; the path may be empty")
		}
	}
	if strings.ContainsAny(o.Region, " \t\r\n/:@?#") {
		wrong("region: %q is not the name of one", o.Region)
	}
	switch {
	case o.AccessKeyID != "" && o.SecretAccessKey == "":
		wrong("secret access key: is missing; an access key id needs one")
	case o.AccessKeyID == "" && (o.SecretAccessKey != "" || o.SessionToken != ""):
		wrong("access key id: is missing; a secret access key or session token needs one")
	}
	if o.SSE != "" && o.SSE != "AES256" && o.SSE != "aws:kms" {
		wrong(`sse: %q is not "AES256" or "aws:kms"`, o.SSE)
	}
	if o.KMSKeyID != "" && o.SSE != "aws:kms" {
		wrong(`kms_key_id: needs sse "aws:kms"`)
	}
	if o.RequestTimeout < 0 || o.MaxAttempts < 0 || o.RetryBudget < 0 || o.Backoff < 0 || o.MultipartThreshold < 0 {
		wrong("timeouts, attempts, budget and sizes must not be negative")
	}
	if o.PartSize != 0 && (o.PartSize < minPartSize || o.PartSize > 5<<30) {
		wrong("part size: %d is not 5 MiB to 5 GiB", o.PartSize)
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
	// noBatch says that the server does not know how to delete many at once.
	noBatch lapsing
	// wantsMD5 says that the server wants the field Content-MD5 with a list of keys
	// to delete.
	wantsMD5 atomic.Bool
	// noMD5 says that ETags of the server look like MD5s and are none.
	noMD5 atomic.Bool
	// unlistedOnce guards the warning that the server does not list uploads.
	unlistedOnce sync.Once
}

var _ object.Store = (*Store)(nil)

// verdictFor is how long a lapsing holds: servers are upgraded, and gateways replaced.
const verdictFor = time.Hour

// lapsing is a finding about a server that is made again after a while. It is safe for
// concurrent use.
type lapsing struct{ until atomic.Int64 }

func (l *lapsing) set()        { l.until.Store(time.Now().Add(verdictFor).UnixNano()) }
func (l *lapsing) holds() bool { return time.Now().UnixNano() < l.until.Load() }

// Open returns the store on a bucket that exists. It finds the credentials and
// does not speak to the store; see package probe for what does. Close it after
// use.
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
		// Both are off in a client that is made this way.
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

// Close releases idle connections. Calls under way are not ended.
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
		// A connection trusts what the file of authorities holds when it is made.
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			now := config.Clone()
			if err := readCA(o, now); err != nil {
				o.Log.Warn("the file of authorities cannot be read again: the first ones are used", zap.Error(err))
			}
			ctx, cancel := context.WithTimeout(ctx, dialer.Timeout+handshakeTimeout)
			defer cancel()
			return (&tls.Dialer{NetDialer: dialer, Config: now}).DialContext(ctx, network, addr)
		},
		TLSClientConfig: config,
		// For 64 requests in flight, so that none makes a connection of its own.
		MaxIdleConns:          128,
		MaxIdleConnsPerHost:   128,
		IdleConnTimeout:       30 * time.Second,
		ExpectContinueTimeout: time.Second,
		// A body is what its length and checksum say.
		DisableCompression: true,
		TLSNextProto:       map[string]func(string, *tls.Conn) http.RoundTripper{},
	}, nil
}

// readCA sets who may sign the server's certificate.
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

// noAcceptEncoding keeps the SDK from setting, and so from signing, the field
// Accept-Encoding. Front ends such as those of GCS and of content networks rewrite
// it, and the signature is then wrong. Without the field a server compresses
// nothing.
func noAcceptEncoding(stack *middleware.Stack) error {
	const id = "DisableAcceptEncodingGzip"
	if _, found := stack.Finalize.Get(id); !found {
		return nil
	}
	_, err := stack.Finalize.Remove(id)
	return err
}

// key is the name of an object in the bucket.
func (s *Store) key(key string) *string { return aws.String(s.o.Prefix + key) }

// check says whether key may be used in this store, and whether ctx is over.
func (s *Store) check(ctx context.Context, key string) error {
	if err := object.CheckKey(key); err != nil {
		return err
	}
	if n := len(s.o.Prefix) + len(key); n > object.MaxKeyBytes {
		return fmt.Errorf("%w: %d bytes with the store's prefix, at most %d", object.ErrInvalidKey, n, object.MaxKeyBytes)
	}
	return ctx.Err()
}

// timeout is for an attempt that sends so many bytes.
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
