package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// maxDetail bounds the quoted part of a server's message, in bytes.
const maxDetail = 300

// failure is an attempt that did not succeed.
type failure struct {
	kind   error         // a sentinel of object, or the context's error
	retry  bool          // another attempt may succeed
	after  time.Duration // the pause that the server requested
	code   string        // of S3; empty: none
	status int           // of HTTP; 0: no response
	detail string        // for the error text
	// certificate is set if the server's certificate is not accepted. It may be that of
	// one server of several, or be replaced.
	certificate bool
}

// unusable is the failure of a response without its mandatory content: the result of the
// request is unknown.
func unusable(format string, args ...any) *failure {
	return &failure{
		kind: object.ErrUnavailable, retry: true, detail: "unusable response: " + fmt.Sprintf(format, args...),
	}
}

// definite reports whether the server refused the request, so that it had no effect. After
// any other failure of a write its result is unknown.
func (f *failure) definite() bool {
	return f.status >= 400 && f.status < 500 && f.code != "" && f.code != "RequestTimeout" &&
		f.status != http.StatusRequestTimeout
}

// permanentDenials are the codes of denials that concern the object itself: no change of
// credentials, policies or clocks cures them within minutes.
var permanentDenials = map[string]bool{
	"InvalidObjectState": true, "ObjectLockedByBucketPolicy": true, "ObjectUnderActiveHold": true, "FileImmutable": true,
	"BlobImmutableDueToPolicy": true,
}

// passingErrors and passingStatuses are the codes and statuses of misconfigurations that
// may pass within minutes: one of several servers does not know a bucket yet, because it
// is new or mounts its disk, or a clock is corrected.
var (
	passingErrors = map[string]bool{
		"NoSuchBucket": true, "ContainerNotFound": true, "RequestTimeTooSkewed": true, "ExpiredRequest": true,
	}
	passingStatuses = map[int]bool{
		http.StatusFound: true, http.StatusTemporaryRedirect: true, http.StatusProxyAuthRequired: true,
	}
)

// mayPass reports whether a refusal may pass, as [object.Passing] defines it.
func (f *failure) mayPass() bool {
	switch {
	case errors.Is(f.kind, object.ErrDenied):
		return !permanentDenials[f.code]
	case errors.Is(f.kind, object.ErrMisconfigured):
		return passingErrors[f.code] || passingStatuses[f.status] || f.certificate
	}
	return false
}

// error returns the error for callers.
func (s *Store) error(op, key string, f *failure) error {
	at := fmt.Sprintf("%s %s in bucket %s", op, key, s.o.Bucket)
	if key == "" {
		at = fmt.Sprintf("%s bucket %s", op, s.o.Bucket)
	}
	kind := f.kind
	if errors.Is(kind, object.ErrFull) {
		lacks := strings.TrimSuffix(f.detail, fullTodo) // callers add the remedy
		return fmt.Errorf("%s: %w", at, &object.FullError{Place: "bucket " + s.o.Bucket, Lacks: lacks})
	}
	if f.mayPass() {
		kind = object.Passing(kind)
	}
	if f.detail == "" {
		return fmt.Errorf("%s: %w", at, kind)
	}
	return fmt.Errorf("%s: %w: %s", at, kind, f.detail)
}

// meaning is the classification of an error code.
type meaning struct {
	kind  error
	retry bool
	todo  string
}

const (
	fullTodo        = "; free space in the store, or raise its quota"
	policyTodo      = "; grant it in the policies of the role and of the bucket"
	credentialsTodo = "; check the access key, its secret and the session token"
	accountTodo     = "; the account is suspended or not entitled: resolve it at the provider"
	capTodo         = "; the account has reached a cap: raise it at the provider, or wait until it is reset"
	lockTodo        = "; a retention or lock rule protects the object: wait until it ends, or change the rule"
	skewTodo        = "; the clocks of this host and of the store differ: correct them"
	regionTodo      = "; set the bucket's own region"
	bucketTodo      = "; make the bucket, or set another"
	kmsTodo         = "; set the store's key service up, or another sse"
	sizeTodo        = "; a proxy in front of the store bounds the size of requests: raise its bound"
	// For responses without a code, which do not come from S3.
	proxyTodo    = "; a proxy, firewall or portal in front of the store may refuse the request: see its log"
	endpointTodo = "; check the endpoint's address, its port, and whether it is http or https"
)

// codes classifies the error codes whose HTTP status is not sufficient.
var codes = map[string]meaning{
	"NoSuchKey":          {kind: object.ErrNotFound},
	"PreconditionFailed": {kind: object.ErrExists},
	"KeyTooLongError":    {kind: object.ErrInvalidKey},
	// From gateways to a file system: the key is the directory of another object. A
	// concurrent delete that empties the directory makes the error pass.
	"ExistingObjectIsDirectory": {kind: object.ErrInvalidKey, retry: true},
	"ObjectParentIsFile":        {kind: object.ErrInvalidKey, retry: true},
	// Likewise, of MinIO and of Tencent's COS.
	"XMinioObjectExistsAsDirectory": {kind: object.ErrInvalidKey, retry: true},
	"XMinioParentIsObject":          {kind: object.ErrInvalidKey, retry: true},
	"PathConflict":                  {kind: object.ErrInvalidKey, retry: true},
	"XMinioInvalidObjectName":       {kind: object.ErrInvalidKey},
	"XMinioInvalidResourceName":     {kind: object.ErrInvalidKey},
	"InvalidObjectName":             {kind: object.ErrInvalidKey}, // of R2
	"InvalidKey":                    {kind: object.ErrInvalidKey}, // of Supabase
	// Of Alibaba's OSS, and of gateways in front of Azure.
	"FileAlreadyExists": {kind: object.ErrExists},
	"BlobAlreadyExists": {kind: object.ErrExists},
	"ConditionNotMet":   {kind: object.ErrExists},
	"BlobNotFound":      {kind: object.ErrNotFound},

	"SlowDown":                   {kind: object.ErrUnavailable, retry: true},
	"ServiceUnavailable":         {kind: object.ErrUnavailable, retry: true},
	"InternalError":              {kind: object.ErrUnavailable, retry: true},
	"RequestTimeout":             {kind: object.ErrUnavailable, retry: true},
	"OperationAborted":           {kind: object.ErrUnavailable, retry: true},
	"ConditionalRequestConflict": {kind: object.ErrUnavailable, retry: true},
	"Throttling":                 {kind: object.ErrUnavailable, retry: true},
	"TooManyRequests":            {kind: object.ErrUnavailable, retry: true},
	"RequestLimitExceeded":       {kind: object.ErrUnavailable, retry: true},
	// Other codes for throttling, some of them with HTTP 400 or 403.
	"ThrottlingException":         {kind: object.ErrUnavailable, retry: true},
	"ThrottledException":          {kind: object.ErrUnavailable, retry: true},
	"RequestThrottled":            {kind: object.ErrUnavailable, retry: true},
	"RequestThrottledException":   {kind: object.ErrUnavailable, retry: true},
	"TooManyRequestsException":    {kind: object.ErrUnavailable, retry: true},
	"BandwidthLimitExceeded":      {kind: object.ErrUnavailable, retry: true},
	"PriorRequestNotComplete":     {kind: object.ErrUnavailable, retry: true},
	"RateLimitExceeded":           {kind: object.ErrUnavailable, retry: true},
	"SlowDownRead":                {kind: object.ErrUnavailable, retry: true}, // of MinIO
	"SlowDownWrite":               {kind: object.ErrUnavailable, retry: true},
	"ServerBusy":                  {kind: object.ErrUnavailable, retry: true}, // of Azure
	"OperationTimedOut":           {kind: object.ErrUnavailable, retry: true},
	"ClientDisconnect":            {kind: object.ErrUnavailable, retry: true}, // of R2, HTTP 400
	"IncompleteBody":              {kind: object.ErrUnavailable, retry: true},
	"BadDigest":                   {kind: object.ErrUnavailable, retry: true}, // altered in transfer
	"XAmzContentSHA256Mismatch":   {kind: object.ErrUnavailable, retry: true},
	"XAmzContentChecksumMismatch": {kind: object.ErrUnavailable, retry: true},

	"XMinioStorageFull":              {kind: object.ErrFull, todo: fullTodo},
	"XMinioAdminBucketQuotaExceeded": {kind: object.ErrFull, todo: fullTodo},
	"QuotaExceeded":                  {kind: object.ErrFull, todo: fullTodo}, // of Ceph and versitygw
	"InsufficientStorageSpace":       {kind: object.ErrFull, todo: fullTodo}, // of Huawei's OBS
	"InsufficientStorage":            {kind: object.ErrFull, todo: fullTodo},

	"AccessDenied":               {kind: object.ErrDenied, todo: policyTodo},
	"InvalidAccessKeyId":         {kind: object.ErrDenied, todo: credentialsTodo},
	"SignatureDoesNotMatch":      {kind: object.ErrDenied, todo: credentialsTodo},
	"InvalidToken":               {kind: object.ErrDenied, todo: credentialsTodo},
	"ExpiredToken":               {kind: object.ErrDenied, todo: credentialsTodo},
	"ExpiredTokenException":      {kind: object.ErrDenied, todo: credentialsTodo}, // of AWS services but S3
	"RequestExpired":             {kind: object.ErrDenied, todo: credentialsTodo},
	"TokenRefreshRequired":       {kind: object.ErrDenied, todo: credentialsTodo},
	"XAdminUserNotFound":         {kind: object.ErrDenied, todo: credentialsTodo}, // versitygw's
	"InvalidTokenId":             {kind: object.ErrDenied, todo: credentialsTodo}, // of MinIO
	"Unauthorized":               {kind: object.ErrDenied, todo: credentialsTodo}, // of R2
	"AuthenticationFailed":       {kind: object.ErrDenied, todo: credentialsTodo}, // of Azure
	"AccountProblem":             {kind: object.ErrDenied, todo: accountTodo},
	"AllAccessDisabled":          {kind: object.ErrDenied, todo: accountTodo},
	"NotSignedUp":                {kind: object.ErrDenied, todo: accountTodo},
	"NotEntitled":                {kind: object.ErrDenied, todo: accountTodo}, // of R2
	"UserSuspended":              {kind: object.ErrDenied, todo: accountTodo}, // of Ceph
	"AccountIsDisabled":          {kind: object.ErrDenied, todo: accountTodo}, // of Azure
	"ObjectLockedByBucketPolicy": {kind: object.ErrDenied, todo: lockTodo},    // of R2
	"ObjectUnderActiveHold":      {kind: object.ErrDenied, todo: lockTodo},    // of GCS
	"FileImmutable":              {kind: object.ErrDenied, todo: lockTodo},    // of OSS, HTTP 409
	"BlobImmutableDueToPolicy":   {kind: object.ErrDenied, todo: lockTodo},    // of Azure, HTTP 409
	"InvalidObjectState":         {kind: object.ErrDenied, todo: "; the object is archived: restore it first"},

	"NoSuchBucket":                       {kind: object.ErrMisconfigured, todo: bucketTodo},
	"RequestTimeTooSkewed":               {kind: object.ErrMisconfigured, todo: skewTodo},
	"NotImplemented":                     {kind: object.ErrMisconfigured, todo: "; the store lacks what snapshotd needs"},
	"MethodNotAllowed":                   {kind: object.ErrMisconfigured, todo: "; the store lacks what snapshotd needs"},
	"AuthorizationHeaderMalformed":       {kind: object.ErrMisconfigured, todo: regionTodo},
	"ContainerNotFound":                  {kind: object.ErrMisconfigured, todo: bucketTodo}, // of Azure
	"InvalidBucketName":                  {kind: object.ErrMisconfigured, todo: bucketTodo},
	"ExpiredRequest":                     {kind: object.ErrMisconfigured, todo: skewTodo},   // of R2
	"InvalidRegion":                      {kind: object.ErrMisconfigured, todo: regionTodo}, // of MinIO
	"IllegalLocationConstraintException": {kind: object.ErrMisconfigured, todo: regionTodo},
	"XMinioKMSNotConfigured":             {kind: object.ErrMisconfigured, todo: kmsTodo},
	"InvalidEncryptionAlgorithmError":    {kind: object.ErrMisconfigured, todo: kmsTodo},
}

// retryable are the statuses below 500 after which another attempt may succeed.
var retryable = map[int]bool{
	http.StatusTooManyRequests: true, http.StatusRequestTimeout: true, http.StatusConflict: true,
	http.StatusLocked: true, http.StatusTooEarly: true, 499: true, // from a proxy: the client closed the connection
}

// isThrottling reports whether a code requests a lower rate. Each service and gateway has
// its own code.
func isThrottling(code string) bool {
	_, known := retry.DefaultThrottleErrorCodes[code]
	return known || strings.Contains(code, "Throttl")
}

// passingKMS are the temporary errors of the key service.
var passingKMS = map[string]bool{
	"KMS.ThrottlingException": true, "KMS.KMSInternalException": true, "KMS.DependencyTimeoutException": true,
	"KMS.KeyUnavailableException": true, "KMS.InternalFailure": true, "KMS.ServiceUnavailable": true,
}

// classify classifies an error of the SDK. Callers must check for the end of a context.
func classify(err error) *failure {
	if err == nil {
		return nil
	}
	f := &failure{kind: object.ErrUnavailable}
	var header http.Header
	if resp, ok := errors.AsType[*smithyhttp.ResponseError](err); ok && resp.Response != nil {
		f.status, header = resp.HTTPStatusCode(), resp.Response.Header
		f.after = retryAfter(header.Get("Retry-After"))
	}
	message := ""
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		f.code, message = api.ErrorCode(), api.ErrorMessage()
		if isSynthetic(f.status, f.code, message) {
			f.code, message = "", ""
		}
	}
	if f.status >= 300 && f.status < 400 {
		f.kind = object.ErrMisconfigured
		f.detail = fmt.Sprintf("the store returned a redirect (HTTP %d), which is not followed; "+
			"set the bucket's own region and endpoint", f.status)
		if region := header.Get("X-Amz-Bucket-Region"); region != "" {
			f.detail += fmt.Sprintf(": the bucket is in region %s", clip(region))
		}
		return f
	}
	todo := f.classifyCode(err, message)
	f.detail = describe(err, f, message) + todo
	if region := header.Get("X-Amz-Bucket-Region"); region != "" && errors.Is(f.kind, object.ErrMisconfigured) {
		f.detail += ": the bucket is in region " + clip(region)
	}
	return f
}

// classifyCode sets kind and retry by code and status. It returns the remedy, which is
// empty or begins with "; ".
func (f *failure) classifyCode(err error, message string) (todo string) {
	m, known := meaningOf(f.code, message)
	switch {
	case known:
		f.kind, f.retry, todo = m.kind, m.retry, m.todo
	case f.status == 0 || f.status < 300: // no response, or an unusable one
		f.retry = true
		if todo = tlsTodo(err); todo != "" {
			f.kind, f.retry = object.ErrMisconfigured, false
			_, f.certificate = errors.AsType[*tls.CertificateVerificationError](err)
		}
	case f.status == http.StatusForbidden || f.status == http.StatusUnauthorized:
		f.kind, todo = object.ErrDenied, codes["AccessDenied"].todo
		if f.code == "" {
			todo = proxyTodo
		}
	case f.status == http.StatusProxyAuthRequired:
		f.kind, todo = object.ErrMisconfigured, proxyTodo
	case f.status == http.StatusRequestEntityTooLarge:
		f.kind, todo = object.ErrMisconfigured, sizeTodo
	case f.status == http.StatusBadRequest && f.code == "":
		f.kind, todo = object.ErrMisconfigured, endpointTodo
	case f.status == http.StatusInsufficientStorage:
		f.kind, todo = object.ErrFull, fullTodo
	case f.status == http.StatusNotImplemented || f.status == http.StatusMethodNotAllowed:
		f.kind, todo = object.ErrMisconfigured, codes["NotImplemented"].todo
	case f.status == http.StatusPreconditionFailed:
		f.kind = object.ErrExists
	case f.status >= 500, retryable[f.status]:
		f.retry = true
	case f.status >= 400 && f.status != http.StatusNotFound && f.status != http.StatusRequestedRangeNotSatisfiable:
		// The store understood and refused the request: the same request fails again.
		f.kind, todo = object.ErrMisconfigured, "; the store refuses this request"
	}
	return todo
}

// meaningOf returns the meaning of an error code with its message; false: the HTTP status
// decides.
func meaningOf(code, message string) (meaning, bool) {
	if strings.HasPrefix(code, "KMS.") {
		if passingKMS[code] || isThrottling(code) {
			return meaning{kind: object.ErrUnavailable, retry: true}, true
		}
		return meaning{kind: object.ErrDenied, todo: "; check the key and its permissions"}, true
	}
	m, known := codes[code]
	if !known && isThrottling(code) {
		return meaning{kind: object.ErrUnavailable, retry: true}, true
	}
	if code == "AccessDenied" && strings.Contains(message, "size quota") { // of Garage
		return codes["QuotaExceeded"], true
	}
	if code == "AccessDenied" && strings.Contains(message, "cap exceeded") { // of Backblaze
		m.todo = capTodo
		if strings.Contains(message, "storage cap") {
			m.kind = object.ErrFull
		}
	}
	return m, known
}

// isSynthetic reports whether the SDK derived code and message from the status, because
// the body has none, for example the page of a proxy.
func isSynthetic(status int, code, message string) bool {
	text := http.StatusText(status)
	return code == "UnknownError" && message == code ||
		text != "" && message == text && code == strings.ReplaceAll(text, " ", "")
}

// tlsTodo returns the remedy for a permanent TLS error, empty for any other error.
func tlsTodo(err error) string {
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "; the endpoint does not speak TLS: http may be meant, or another port"
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok {
		return ""
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return "; renew the store's certificate, or correct the clock of this host"
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "; set the endpoint to a name that the store's certificate has"
	}
	return "; set the CA file of the store's certificate"
}

func describe(err error, f *failure, message string) string {
	if f.code == "" && f.status == 0 {
		// Unwrap the SDK's text down to the connection or parse error.
		if op, ok := errors.AsType[*smithy.OperationError](err); ok {
			err = op.Unwrap()
		}
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Unwrap()
		}
		return clip(err.Error())
	}
	text := f.code
	if text == "" {
		text = "not a response of S3"
	}
	if message != "" {
		text += ": " + clip(message)
	}
	if f.status != 0 {
		text += fmt.Sprintf(" (HTTP %d)", f.status)
	}
	return text
}

// clip makes a server's message one short line.
func clip(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if len(text) > maxDetail {
		text = strings.ToValidUTF8(text[:maxDetail], "") + "…"
	}
	return text
}

func retryAfter(text string) time.Duration {
	seconds, err := strconv.Atoi(text)
	if err != nil || seconds < 0 {
		return 0
	}
	return min(time.Duration(seconds)*time.Second, maxRetryAfter)
}

// contextEnd returns the failure for the end of ctx, or nil.
func contextEnd(ctx context.Context) *failure {
	if err := ctx.Err(); err != nil {
		return &failure{kind: err}
	}
	return nil
}
