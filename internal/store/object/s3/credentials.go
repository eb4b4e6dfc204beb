package s3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Intervals between reads of the credentials.
const (
	keysLifetime  = time.Minute     // of those that ReadKeys returns
	refreshPause  = 2 * time.Second // between two reads after refused credentials
	deniedPause   = time.Minute     // between two reads after a denied permission
	lookupTimeout = time.Minute
)

// Keys are the credentials of an access key.
type Keys struct {
	AccessKeyID     string
	SecretAccessKey Secret
	SessionToken    Secret // empty for a key without one
}

// staleKeys are the error codes that new credentials may cure: operators replace keys,
// and tokens expire, while a store is open.
var staleKeys = map[string]bool{
	"InvalidAccessKeyId": true, "SignatureDoesNotMatch": true, "ExpiredToken": true, "InvalidToken": true,
	"TokenRefreshRequired": true, "XAdminUserNotFound": true, // of versitygw
	"ExpiredTokenException": true, "RequestExpired": true, "InvalidTokenId": true, "Unauthorized": true,
	"AuthenticationFailed": true,
}

// maxAge returns the minimum age at which refused credentials are read again, and false
// if new credentials do not help. A store may refuse the token of a replaced role as a
// denied permission; such refusals have a longer interval.
func maxAge(f *failure) (time.Duration, bool) {
	switch {
	case staleKeys[f.code]:
		return refreshPause, true
	case errors.Is(f.kind, object.ErrDenied) && f.mayPass():
		return deniedPause, true
	}
	return 0, false
}

// keyring provides the credentials of requests, and reads them again after a refusal. It
// is safe for concurrent use.
type keyring struct {
	cache *aws.CredentialsCache

	mu        sync.Mutex
	refreshed time.Time
}

// retrieve returns the credentials of the next request.
func (k *keyring) retrieve(ctx context.Context) (aws.Credentials, error) {
	return k.cache.Retrieve(ctx)
}

// changedSince reports whether the credentials differ from the refused ones. If they do
// not, it reads them again, at most once per pause.
func (k *keyring) changedSince(ctx context.Context, used aws.Credentials, pause time.Duration) bool {
	differs := func() bool {
		now, err := k.cache.Retrieve(ctx)
		return err == nil && (now.AccessKeyID != used.AccessKeyID ||
			now.SecretAccessKey != used.SecretAccessKey || now.SessionToken != used.SessionToken)
	}
	if differs() {
		return true
	}
	k.mu.Lock()
	due := k.refreshed.IsZero() || time.Since(k.refreshed) >= pause
	if due {
		k.refreshed = time.Now()
	}
	k.mu.Unlock()
	if !due {
		return false
	}
	k.cache.Invalidate()
	return differs()
}

// signer signs requests. The SDK's signer caches derived keys by access key id alone, so
// it would use the old secret after a replacement; signer creates a new one for each
// secret.
type signer struct {
	mu     sync.Mutex
	secret string
	v4     *v4.Signer
}

// SignHTTP implements [s3.HTTPSignerV4].
func (s *signer) SignHTTP(ctx context.Context, keys aws.Credentials, r *http.Request, hash, service, region string,
	at time.Time, options ...func(*v4.SignerOptions),
) error {
	s.mu.Lock()
	if s.v4 == nil || s.secret != keys.SecretAccessKey {
		s.secret = keys.SecretAccessKey
		s.v4 = v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
	}
	sign := s.v4.SignHTTP
	s.mu.Unlock()
	return sign(ctx, keys, r, hash, service, region, at, options...)
}

// keyReader provides the credentials of ReadKeys. If a read fails, it returns the last
// ones.
type keyReader struct {
	read func() (Keys, error)

	mu   sync.Mutex
	last Keys
}

// Retrieve implements [aws.CredentialsProvider].
func (r *keyReader) Retrieve(context.Context) (aws.Credentials, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	keys, err := r.read()
	switch {
	case err == nil && keys.AccessKeyID != "" && keys.SecretAccessKey != "":
		r.last = keys
	case r.last.AccessKeyID == "":
		return aws.Credentials{}, errors.Join(errors.New("no access key was read"), err)
	}
	return aws.Credentials{
		AccessKeyID: r.last.AccessKeyID, SecretAccessKey: string(r.last.SecretAccessKey),
		SessionToken: string(r.last.SessionToken),
		Source:       "snapshotd configuration", CanExpire: true, Expires: time.Now().Add(keysLifetime),
	}, nil
}

func findCredentials(ctx context.Context, o Options, config *tls.Config) (*keyring, error) {
	switch {
	case o.ReadKeys != nil:
		k := &keyring{cache: aws.NewCredentialsCache(&keyReader{read: o.ReadKeys})}
		if _, err := k.retrieve(ctx); err != nil {
			return nil, fmt.Errorf("%w: %s", object.ErrDenied, clip(err.Error()))
		}
		return k, nil
	case o.AccessKeyID != "":
		fixed := credentials.NewStaticCredentialsProvider(o.AccessKeyID, string(o.SecretAccessKey), string(o.SessionToken))
		return &keyring{cache: aws.NewCredentialsCache(fixed)}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	// The SDK's own client, to which AWS_CA_BUNDLE can add authorities.
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.Proxy = nil
		t.TLSClientConfig = config.Clone()
	})
	cfg, err := awsconfig.LoadDefaultConfig(ctx, awsconfig.WithRegion(o.Region), awsconfig.WithHTTPClient(client))
	if err == nil {
		_, err = cfg.Credentials.Retrieve(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: no credentials found; set an access key, or assign a role to the process: %s",
			object.ErrDenied, clip(err.Error()))
	}
	cache, ok := cfg.Credentials.(*aws.CredentialsCache)
	if !ok {
		cache = aws.NewCredentialsCache(cfg.Credentials)
	}
	return &keyring{cache: cache}, nil
}
