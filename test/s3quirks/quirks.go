package s3quirks

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"hash/fnv"
	"html"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/test/s3fault"
)

// Refusal returns an S3 error with a message.
func Refusal(status int, code, message string) *s3fault.Answer {
	var text strings.Builder
	_ = xml.EscapeText(&text, []byte(message)) // never fails
	body := fmt.Appendf(
		nil,
		"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code><Message>%s</Message></Error>",
		code,
		text.String(),
	)
	return &s3fault.Answer{Status: status, Header: http.Header{"Content-Type": {"application/xml"}}, Body: body}
}

// Match selects the requests of some operations whose key matches. Without
// operations it selects all operations, without a pattern all keys.
type Match struct {
	Ops []s3fault.Op
	Key *regexp.Regexp
	// Skip is the number of these requests that pass first, Times the number of
	// selected ones after that. Times 0 selects all.
	Skip, Times int
}

func (m Match) selects(r *Request) bool {
	return (len(m.Ops) == 0 || slices.Contains(m.Ops, r.Op)) && (m.Key == nil || m.Key.MatchString(r.Key))
}

// Refuse responds to matching requests with an error and the header fields. The
// server does not get them.
func Refuse(m Match, status int, code, message string, header http.Header) Quirk {
	return func(next Handler) Handler {
		var mu sync.Mutex
		seen := 0
		return func(r *Request) *s3fault.Answer {
			if !m.selects(r) {
				return next(r)
			}
			mu.Lock()
			seen++
			concerned := seen > m.Skip && (m.Times == 0 || seen <= m.Skip+m.Times)
			mu.Unlock()
			if !concerned {
				return next(r)
			}
			answer := Refusal(status, code, message)
			maps.Copy(answer.Header, header)
			return answer
		}
	}
}

// Lacks rejects operations as not implemented.
func Lacks(ops ...s3fault.Op) Quirk {
	return Refuse(
		Match{Ops: ops},
		http.StatusNotImplemented,
		"NotImplemented",
		"A header or query you provided implies functionality that is not implemented.",
		nil,
	)
}

// writes are the operations that change the content of a key.
var writes = []s3fault.Op{s3fault.PutObject, s3fault.CopyObject, s3fault.CompleteMultipartUpload}

// RatePerKey accepts one write per key and interval, and rejects others with HTTP
// 429.
func RatePerKey(interval time.Duration) Quirk {
	return func(next Handler) Handler {
		var mu sync.Mutex
		last := map[string]time.Time{}
		return func(r *Request) *s3fault.Answer {
			if slices.Contains(writes, r.Op) {
				now := time.Now()
				mu.Lock()
				early := now.Sub(last[r.URL.Path]) < interval
				if !early {
					last[r.URL.Path] = now
				}
				mu.Unlock()
				if early {
					return Refusal(
						http.StatusTooManyRequests,
						"TooManyRequests",
						"Reduce your concurrent request rate for the same object.",
					)
				}
			}
			return next(r)
		}
	}
}

// RewritesAcceptEncoding replaces the field Accept-Encoding, as compressing front
// ends do. A signature that covers the field becomes invalid.
func RewritesAcceptEncoding() Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			r.Header.Set("Accept-Encoding", "gzip, br, rewritten")
			return next(r)
		}
	}
}

// RequiresContentMD5 rejects DeleteObjects without the field Content-MD5.
func RequiresContentMD5(code string) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			if r.Op == s3fault.DeleteObjects && r.Header.Get("Content-Md5") == "" {
				return Refusal(http.StatusBadRequest, code, "Missing required header for this request: Content-MD5")
			}
			return next(r)
		}
	}
}

// Ignores removes a header field of requests, as a server without support for it.
func Ignores(field string, ops ...s3fault.Op) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			if r.Header.Get(field) == "" || len(ops) > 0 && !slices.Contains(ops, r.Op) {
				return next(r)
			}
			r.Header.Del(field)
			if err := r.Resign(); err != nil {
				return Refusal(http.StatusInternalServerError, "InternalError", err.Error())
			}
			return next(r)
		}
	}
}

// UnderPath serves S3 below a path, as in http://host/storage/v1/s3.
func UnderPath(path string) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			rest, found := strings.CutPrefix(r.URL.Path, path)
			if !found || rest == "" {
				return Refusal(http.StatusNotFound, "NoSuchPath", "No such path.")
			}
			r.URL.Path = rest
			r.URL.RawPath = strings.TrimPrefix(r.URL.RawPath, path)
			r.RequestURI = ""
			if source := r.Header.Get("X-Amz-Copy-Source"); source != "" {
				r.Header.Set("X-Amz-Copy-Source", strings.TrimPrefix(source, path))
			}
			r.Op, r.Key = s3fault.Classify(r.Request)
			if err := r.Resign(); err != nil {
				return Refusal(http.StatusInternalServerError, "InternalError", err.Error())
			}
			return next(r)
		}
	}
}

var (
	contents = regexp.MustCompile(`(?s)<Contents>.*?</Contents>`)
	objectIn = regexp.MustCompile(`(?s)<Object>.*?</Object>`)
	keyIn    = regexp.MustCompile(`<Key>([^<]*)</Key>`)
	keyCount = regexp.MustCompile(`<KeyCount>\d+</KeyCount>`)
	etagIn   = regexp.MustCompile(`<ETag>(&quot;|&#34;|")?([^<"&]*)(&quot;|&#34;|")?</ETag>`)
)

// editList changes the entries of the server's listings.
func editList(change func(r *Request, entries []string) []string) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			answer := next(r)
			if r.Op != s3fault.ListObjectsV2 || answer.Status != http.StatusOK {
				return answer
			}
			body := string(answer.Body)
			entries := contents.FindAllString(body, -1)
			if len(entries) == 0 {
				return answer
			}
			at := contents.FindStringIndex(body)[0]
			rest := contents.ReplaceAllLiteralString(body, "")
			entries = change(r, entries)
			body = rest[:at] + strings.Join(entries, "") + rest[at:]
			answer.Body = []byte(keyCount.ReplaceAllLiteralString(body, "<KeyCount>"+strconv.Itoa(len(entries))+"</KeyCount>"))
			return answer
		}
	}
}

func keyOf(entry string) string {
	if m := keyIn.FindStringSubmatch(entry); m != nil {
		return m[1]
	}
	return ""
}

// UnorderedLists sorts each page of a list by a hash of the keys.
func UnorderedLists() Quirk {
	hash := func(entry string) uint64 {
		h := fnv.New64a()
		_, _ = h.Write([]byte(keyOf(entry))) // never fails
		return h.Sum64()
	}
	return editList(func(_ *Request, entries []string) []string {
		slices.SortFunc(entries, func(a, b string) int {
			switch x, y := hash(a), hash(b); {
			case x < y:
				return -1
			case x > y:
				return 1
			}
			return 0
		})
		return entries
	})
}

// EmptyLists returns empty lists for matching prefixes.
func EmptyLists(prefix *regexp.Regexp) Quirk {
	return editList(func(r *Request, entries []string) []string {
		if prefix.MatchString(r.URL.Query().Get("prefix")) {
			return nil
		}
		return entries
	})
}

// OtherETags gives each object the ETag of an upload in parts, as a store that
// splits objects. It translates conditions back.
func OtherETags() Quirk {
	const suffix = "-1"
	strip := func(value string) string {
		if !strings.Contains(value, "-") && value != "*" {
			return `"of no object"` // no object has such an ETag
		}
		return strings.ReplaceAll(value, suffix+`"`, `"`)
	}
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			changed := false
			for _, name := range []string{"If-Match", "X-Amz-Copy-Source-If-Match"} {
				if value := r.Header.Get(name); value != "" {
					r.Header.Set(name, strip(value))
					changed = true
				}
			}
			if r.Op == s3fault.CompleteMultipartUpload {
				if body := etagIn.ReplaceAllFunc(r.Body, func(tag []byte) []byte {
					return []byte(strings.Replace(string(tag), suffix, "", 1))
				}); string(body) != string(r.Body) {
					r.setBody(body)
					changed = true
				}
			}
			if changed {
				if err := r.Resign(); err != nil {
					return Refusal(http.StatusInternalServerError, "InternalError", err.Error())
				}
			}
			answer := next(r)
			if tag := answer.Header.Get("Etag"); tag != "" && !strings.Contains(tag, "-") {
				answer.Header.Set("Etag", `"`+strings.Trim(tag, `"`)+suffix+`"`)
			}
			answer.Body = etagIn.ReplaceAllFunc(answer.Body, func(tag []byte) []byte {
				m := etagIn.FindSubmatch(tag)
				if bytes.Contains(m[2], []byte("-")) {
					return tag
				}
				return fmt.Appendf(nil, "<ETag>&quot;%s%s&quot;</ETag>", m[2], suffix)
			})
			return answer
		}
	}
}

// ListsOtherETags gives objects another ETag in lists than in other responses.
func ListsOtherETags() Quirk {
	return editList(func(_ *Request, entries []string) []string {
		for i := range entries {
			entries[i] = etagIn.ReplaceAllString(entries[i], "<ETag>&quot;${2}-l&quot;</ETag>")
		}
		return entries
	})
}

// ListsPlus encodes the keys of lists except for a plus, which clients then decode
// as a space.
func ListsPlus() Quirk {
	encoded := editList(func(_ *Request, entries []string) []string {
		for i := range entries {
			entries[i] = keyIn.ReplaceAllStringFunc(entries[i], func(key string) string {
				name := html.UnescapeString(keyIn.FindStringSubmatch(key)[1])
				return "<Key>" + strings.NewReplacer("+", "%20", "%2B", "+").Replace(url.QueryEscape(name)) + "</Key>"
			})
		}
		return entries
	})
	return func(next Handler) Handler {
		next = encoded(next)
		return func(r *Request) *s3fault.Answer {
			answer := next(r)
			if r.Op == s3fault.ListObjectsV2 {
				answer.Body = bytes.Replace(answer.Body, []byte("<EncodingType><"), []byte("<EncodingType>url<"), 1)
			}
			return answer
		}
	}
}

// LosesDeletes confirms the deletes of matching keys in DeleteObjects without
// deleting them.
func LosesDeletes(key *regexp.Regexp) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			if r.Op != s3fault.DeleteObjects {
				return next(r)
			}
			var lost strings.Builder
			r.Body = objectIn.ReplaceAllFunc(r.Body, func(entry []byte) []byte {
				name := keyIn.FindSubmatch(entry)
				if name == nil || !key.Match(name[1]) {
					return entry
				}
				fmt.Fprintf(&lost, "<Deleted><Key>%s</Key></Deleted>", name[1])
				return nil
			})
			if lost.Len() == 0 {
				return next(r)
			}
			if !objectIn.Match(r.Body) {
				return &s3fault.Answer{
					Status: http.StatusOK, Header: http.Header{"Content-Type": {"application/xml"}},
					Body: []byte("<DeleteResult>" + lost.String() + "</DeleteResult>"),
				}
			}
			r.setBody(r.Body)
			sum := md5.Sum(r.Body) // versitygw requires a digest of the body
			r.Header.Set("Content-Md5", base64.StdEncoding.EncodeToString(sum[:]))
			if err := r.Resign(); err != nil {
				return Refusal(http.StatusInternalServerError, "InternalError", err.Error())
			}
			answer := next(r)
			answer.Body = bytes.Replace(answer.Body, []byte("</DeleteResult>"), []byte(lost.String()+"</DeleteResult>"), 1)
			answer.Header.Del("Content-Length")
			return answer
		}
	}
}

// DecodesSourceTwice decodes the name of a copy's source once too often.
func DecodesSourceTwice() Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			source := r.Header.Get("X-Amz-Copy-Source")
			if !strings.Contains(source, "%25") {
				return next(r)
			}
			r.Header.Set("X-Amz-Copy-Source", strings.ReplaceAll(source, "%25", "%"))
			if err := r.Resign(); err != nil {
				return Refusal(http.StatusInternalServerError, "InternalError", err.Error())
			}
			return next(r)
		}
	}
}

// AllowsKeys rejects writes of keys that do not match.
func AllowsKeys(pattern *regexp.Regexp) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			creates := slices.Contains(writes, r.Op) || r.Op == s3fault.CreateMultipartUpload
			if creates && !pattern.MatchString(r.Key) {
				return Refusal(http.StatusBadRequest, "InvalidKey", "Invalid key: "+r.Key)
			}
			return next(r)
		}
	}
}

// RefusesTags rejects writes with tags.
func RefusesTags(status int, code string) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			if r.Header.Get("X-Amz-Tagging") != "" {
				return Refusal(status, code, "Header 'x-amz-tagging' with value not implemented")
			}
			return next(r)
		}
	}
}

// OwnETags gives objects that were written in one request ETags in the form of an
// MD5 that depend on the key. It translates conditions back.
func OwnETags() Quirk {
	turn := func(key, tag string) string { // its own inverse
		sum := sha256.Sum256([]byte(key))
		raw, err := hex.DecodeString(tag)
		if err != nil || len(raw) != 16 {
			return tag
		}
		for i := range raw {
			raw[i] ^= sum[i]
		}
		return hex.EncodeToString(raw)
	}
	inBody := func(key string, body []byte) []byte {
		return etagIn.ReplaceAllFunc(body, func(tag []byte) []byte {
			return fmt.Appendf(nil, "<ETag>&quot;%s&quot;</ETag>", turn(key, string(etagIn.FindSubmatch(tag)[2])))
		})
	}
	list := editList(func(_ *Request, entries []string) []string {
		for i := range entries {
			entries[i] = string(inBody(html.UnescapeString(keyOf(entries[i])), []byte(entries[i])))
		}
		return entries
	})
	return func(next Handler) Handler {
		next = list(next)
		return func(r *Request) *s3fault.Answer {
			if tag := r.Header.Get("X-Amz-Copy-Source-If-Match"); tag != "" {
				source, _ := url.PathUnescape(r.Header.Get("X-Amz-Copy-Source"))
				_, key, _ := strings.Cut(strings.TrimPrefix(source, "/"), "/")
				r.Header.Set("X-Amz-Copy-Source-If-Match", `"`+turn(key, strings.Trim(tag, `"`))+`"`)
				if err := r.Resign(); err != nil {
					return Refusal(http.StatusInternalServerError, "InternalError", err.Error())
				}
			}
			answer := next(r)
			switch r.Op {
			case s3fault.PutObject, s3fault.GetObject, s3fault.HeadObject:
				if tag := answer.Header.Get("Etag"); tag != "" {
					answer.Header.Set("Etag", `"`+turn(r.Key, strings.Trim(tag, `"`))+`"`)
				}
			case s3fault.CopyObject:
				answer.Body = inBody(r.Key, answer.Body)
			default: // ETags of parts, and none
			}
			return answer
		}
	}
}

// Full rejects all operations that need space. Reads and deletes work.
func Full(status int, code string) Quirk {
	return Refuse(Match{Ops: []s3fault.Op{
		s3fault.PutObject, s3fault.CopyObject, s3fault.CreateMultipartUpload, s3fault.UploadPart,
		s3fault.UploadPartCopy, s3fault.CompleteMultipartUpload,
	}}, status, code, "No space left on the store.", nil)
}

// Versioned adds the header fields of a bucket with versions.
func Versioned() Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			answer := next(r)
			if answer.Status < 300 && r.Key != "" {
				answer.Header.Set("X-Amz-Version-Id", "3sL4kqtJlcpXroDTDmJ.rmSpXd3dIbrHY")
				if r.Op == s3fault.DeleteObject {
					answer.Header.Set("X-Amz-Delete-Marker", "true")
				}
			}
			return answer
		}
	}
}

// Archived rejects reads and copies of matching keys, as a store does for objects
// of an archive class.
func Archived(key *regexp.Regexp) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			read := r.Op == s3fault.GetObject && key.MatchString(r.Key)
			copied := r.Op == s3fault.CopyObject && key.MatchString(r.Header.Get("X-Amz-Copy-Source"))
			if read || copied {
				return Refusal(
					http.StatusForbidden,
					"InvalidObjectState",
					"The operation is not valid for the object's storage class",
				)
			}
			return next(r)
		}
	}
}

// RespondsWith changes the status of successful responses of an operation.
func RespondsWith(op s3fault.Op, status int) Quirk {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			answer := next(r)
			if r.Op == op && answer.Status < 300 {
				answer.Status = status
			}
			return answer
		}
	}
}
