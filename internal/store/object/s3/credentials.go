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

// How often credentials are read again.
const (
	keysKeptFor   = time.Minute     // those that ReadKeys returns
	refreshPause  = 2 * time.Second // between two reads that a refusal of the credentials asks for
	deniedPause   = time.Minute     // between two reads that a refusal of the right asks for
	lookupTimeout = time.Minute
)

// Keys are the credentials of an access key.
type Keys struct {
	AccessKeyID     string
	SecretAccessKey Secret
	SessionToken    Secret // empty for a key without one
}

// staleKeys are the codes of S3 that another credential may cure. Operators replace
// keys and tokens expire while a store is open.
var staleKeys = map[string]bool{
	"InvalidAccessKeyId": true, "SignatureDoesNotMatch": true, "ExpiredToken": true, "InvalidToken": true,
	"TokenRefreshRequired": true, "XAdminUserNotFound": true, // versitygw's
	"ExpiredTokenException": true, "RequestExpired": true, "InvalidTokenId": true, "Unauthorized": true, "AuthenticationFailed": true,
}

// maxAge returns how old the credentials of a refused request may be before they are
// read again, and false if other credentials do not help. A store refuses a token
// of a role that was replaced, too, as a lack of rights: so then as well, but not as
// often.
func maxAge(f *failure) (time.Duration, bool) {
	switch {
	case staleKeys[f.code]:
		return refreshPause, true
	case errors.Is(f.kind, object.ErrDenied) && f.mayPass():
		return deniedPause, true
	}
	return 0, false
}

// keyring gives requests their credentials and reads them again when the store
// refuses them. It is safe for concurrent use.
type keyring struct {
	cache *aws.CredentialsCache

	mu        sync.Mutex
	refreshed time.Time
}

// retrieve returns the credentials that the next request is signed with.
func (k *keyring) retrieve(ctx context.Context) (aws.Credentials, error) {
	return k.cache.Retrieve(ctx)
}

// changedSince reports whether the credentials differ from used, which the store
// has refused. It reads them again when they do not and the last read is pause ago.
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
	again := k.refreshed.IsZero() || time.Since(k.refreshed) >= pause
	if again {
		k.refreshed = time.Now()
	}
	k.mu.Unlock()
	if !again {
		return false
	}
	k.cache.Invalidate()
	return differs()
}

// signer signs requests. The SDK's signer keeps derived keys by access key id alone,
// so it would go on with the old secret of an id whose secret was replaced; signer
// makes another one for each secret.
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

// keyReader is the provider of credentials that ReadKeys returns. When they cannot
// be read it goes on with the last ones.
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
		return aws.Credentials{}, errors.Join(errors.New("no access key could be read"), err)
	}
	return aws.Credentials{
		AccessKeyID: r.last.AccessKeyID, SecretAccessKey: string(r.last.SecretAccessKey), SessionToken: string(r.last.SessionToken),
		Source: "snapshotd configuration", CanExpire: true, Expires: time.Now().Add(keysKeptFor),
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
	// The SDK's own client, which it may teach more authorities by AWS_CA_BUNDLE.
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.Proxy = nil
		t.TLSClientConfig = config.Clone()
	})
	cfg, err := awsconfig.LoadDefaultConfig(ctx, awsconfig.WithRegion(o.Region), awsconfig.WithHTTPClient(client))
	if err == nil {
		_, err = cfg.Credentials.Retrieve(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: no credentials were found; set an access key, or give the process a role: %s", object.ErrDenied, clip(err.Error()))
	}
	cache, ok := cfg.Credentials.(*aws.CredentialsCache)
	if !ok {
		cache = aws.NewCredentialsCache(cfg.Credentials)
	}
	return &keyring{cache: cache}, nil
}
