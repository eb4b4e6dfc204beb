package s3

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// answered returns the SDK's error for a response. Without a code the response does not come
// from S3, and the SDK derives a code from the status.
func answered(status int, code, message string) error {
	if text := http.StatusText(status); code == "" {
		code, message = cmp.Or(strings.ReplaceAll(text, " ", ""), "UnknownError"), cmp.Or(text, "UnknownError")
	}
	err := error(&smithy.GenericAPIError{Code: code, Message: message})
	response := &smithyhttp.Response{Response: &http.Response{StatusCode: status, Header: http.Header{}}}
	return &smithy.OperationError{Err: &smithyhttp.ResponseError{Response: response, Err: err}}
}

// unanswered returns the SDK's error for a failed connection.
func unanswered(cause error) error {
	return &smithy.OperationError{Err: &smithyhttp.RequestSendError{Err: &url.Error{
		Op: "Put", URL: "https://store",
		Err: cause,
	}}}
}

// TestErrors is the table of error responses of S3 and of compatible servers: the kind of the
// error, whether it is retried, and its remedy.
func TestErrors(t *testing.T) {
	expired := &tls.CertificateVerificationError{Err: x509.CertificateInvalidError{Reason: x509.Expired}}
	misnamed := &tls.CertificateVerificationError{Err: x509.HostnameError{Certificate: &x509.Certificate{}, Host: "store"}}
	unknown := &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}
	for _, c := range []struct {
		name  string
		err   error
		kind  error
		retry bool
		todo  string // a part of the text
	}{
		{"AWS throttles with 400", answered(400, "ThrottlingException", ""), object.ErrUnavailable, true, ""},
		{"AWS throttles with 403", answered(403, "RequestThrottled", ""), object.ErrUnavailable, true, ""},
		{"bandwidth", answered(403, "BandwidthLimitExceeded", ""), object.ErrUnavailable, true, ""},
		{"GCS, 429", answered(429, "SlowDown", ""), object.ErrUnavailable, true, ""},
		{"GCS, rate", answered(403, "RateLimitExceeded", ""), object.ErrUnavailable, true, ""},
		{"R2, 429", answered(429, "TooManyRequests", ""), object.ErrUnavailable, true, ""},
		{"R2, cut off", answered(400, "ClientDisconnect", ""), object.ErrUnavailable, true, ""},
		{"MinIO, altered in transfer", answered(400, "XAmzContentChecksumMismatch", ""), object.ErrUnavailable, true, ""},
		{"MinIO at its start", answered(503, "XMinioServerNotInitialized", ""), object.ErrUnavailable, true, ""},
		{"Azure is busy", answered(503, "ServerBusy", ""), object.ErrUnavailable, true, ""},
		{"key service throttles", answered(400, "KMS.ThrottlingException", ""), object.ErrUnavailable, true, ""},
		{"unknown conflict", answered(409, "SomethingNew", ""), object.ErrUnavailable, true, ""},
		{"unknown 5xx", answered(521, "", ""), object.ErrUnavailable, true, ""},
		{"unknown 4xx", answered(422, "SomethingNew", ""), object.ErrMisconfigured, false, "refuses this request"},

		{"MinIO, a directory", answered(409, "XMinioObjectExistsAsDirectory", ""), object.ErrInvalidKey, true, ""},
		{"MinIO, an object above", answered(400, "XMinioParentIsObject", ""), object.ErrInvalidKey, true, ""},
		{"MinIO, name", answered(400, "XMinioInvalidObjectName", ""), object.ErrInvalidKey, false, ""},
		{"R2, name", answered(400, "InvalidObjectName", ""), object.ErrInvalidKey, false, ""},
		{"OSS, exists", answered(409, "FileAlreadyExists", ""), object.ErrExists, false, ""},
		{"Azure, exists", answered(409, "BlobAlreadyExists", ""), object.ErrExists, false, ""},
		{"Azure, not found", answered(404, "BlobNotFound", ""), object.ErrNotFound, false, ""},
		{"404 of an ingress", answered(404, "", ""), object.ErrUnavailable, false, ""},

		{"Ceph's quota", answered(403, "QuotaExceeded", ""), object.ErrFull, false, "raise its quota"},
		{
			"Garage's quota", answered(403, "AccessDenied",
				"Forbidden: Bucket size quota is reached, maximum total size of objects for this bucket: 1024"),
			object.ErrFull, false, "raise its quota",
		},
		{"OBS is full", answered(403, "InsufficientStorageSpace", ""), object.ErrFull, false, "raise its quota"},
		{
			"B2's storage cap", answered(403, "AccessDenied", "Cannot upload files, storage cap exceeded."), object.ErrFull,
			false, "reached a cap",
		},
		{
			"B2's transaction cap", answered(403, "AccessDenied", "Transaction cap exceeded, see Caps & Alerts"),
			object.ErrDenied, false, "reached a cap",
		},

		{"policy", answered(403, "AccessDenied", "no"), object.ErrDenied, false, "grant it in the policies"},
		{"403 of a firewall", answered(403, "", ""), object.ErrDenied, false, "firewall or portal in front"},
		{"401 of a proxy", answered(401, "", ""), object.ErrDenied, false, "firewall or portal in front"},
		{"407", answered(407, "", ""), object.ErrMisconfigured, false, "firewall or portal in front"},
		{"R2, 401", answered(401, "Unauthorized", ""), object.ErrDenied, false, "check the access key"},
		{"R2, no subscription", answered(403, "NotEntitled", ""), object.ErrDenied, false, "at the provider"},
		{"Ceph, suspended", answered(403, "UserSuspended", ""), object.ErrDenied, false, "at the provider"},
		{"AWS, account", answered(403, "AccountProblem", ""), object.ErrDenied, false, "at the provider"},
		{
			"R2, bucket lock", answered(403, "ObjectLockedByBucketPolicy", ""), object.ErrDenied, false,
			"retention or lock rule",
		},
		{"OSS, retention", answered(409, "FileImmutable", ""), object.ErrDenied, false, "retention or lock rule"},
		{
			"Azure, retention", answered(409, "BlobImmutableDueToPolicy", ""), object.ErrDenied, false,
			"retention or lock rule",
		},

		{"R2, clock", answered(400, "ExpiredRequest", ""), object.ErrMisconfigured, false, "correct them"},
		{"MinIO, region", answered(400, "InvalidRegion", ""), object.ErrMisconfigured, false, "own region"},
		{"Azure, no container", answered(404, "ContainerNotFound", ""), object.ErrMisconfigured, false, "make the bucket"},
		{"MinIO, no KMS", answered(501, "XMinioKMSNotConfigured", ""), object.ErrMisconfigured, false, "key service"},
		{"413 of a proxy", answered(413, "", ""), object.ErrMisconfigured, false, "size of requests"},
		{"plain HTTP to TLS", answered(400, "", ""), object.ErrMisconfigured, false, "http or https"},

		{
			"TLS to plain HTTP", unanswered(tls.RecordHeaderError{Msg: "not a TLS handshake"}), object.ErrMisconfigured, false,
			"does not speak TLS",
		},
		{"certificate expired", unanswered(expired), object.ErrMisconfigured, false, "renew the store's certificate"},
		{"certificate of another", unanswered(misnamed), object.ErrMisconfigured, false, "that the store's certificate has"},
		{"certificate of an unknown authority", unanswered(unknown), object.ErrMisconfigured, false, "set the CA file"},
		{"no connection", unanswered(errors.New("connection refused")), object.ErrUnavailable, true, ""},
	} {
		f := classify(c.err)
		if !errors.Is(f.kind, c.kind) || f.retry != c.retry || !strings.Contains(f.detail, c.todo) {
			t.Errorf("%s: got %v, retry %v: %s", c.name, f.kind, f.retry, f.detail)
		}
	}
}

// TestDeleteErrors is the table for the errors of single keys of a batch delete.
func TestDeleteErrors(t *testing.T) {
	for code, want := range map[string]struct {
		kind  error
		retry bool
	}{
		"SlowDownWrite":            {object.ErrUnavailable, true},
		"KMS.InternalFailure":      {object.ErrUnavailable, true},
		"KMS.DisabledException":    {object.ErrDenied, false},
		"BlobImmutableDueToPolicy": {object.ErrDenied, false},
	} {
		if f := classifyDelete(code, ""); !errors.Is(f.kind, want.kind) || f.retry != want.retry {
			t.Errorf("%s: got %v, retry %v", code, f.kind, f.retry)
		}
	}
	if f := classifyDelete("BlobNotFound", ""); f != nil {
		t.Errorf("a missing key: %v", f.kind)
	}
}
