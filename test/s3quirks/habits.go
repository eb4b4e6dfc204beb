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

// Refusal is an error of S3 with a message.
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

// Match selects requests: those of one of the operations, or of all when there
// is none, whose key matches, or any key when the pattern is nil.
type Match struct {
	Ops []s3fault.Op
	Key *regexp.Regexp
	// Skip is how many of them pass first, Times how many are then concerned.
	// Times 0 means all.
	Skip, Times int
}

func (m Match) selects(r *Request) bool {
	return (len(m.Ops) == 0 || slices.Contains(m.Ops, r.Op)) && (m.Key == nil || m.Key.MatchString(r.Key))
}

// Refuse answers the requests that match with an error and the header fields,
// and does not ask the server.
func Refuse(m Match, status int, code, message string, header http.Header) Habit {
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

// Lacks refuses operations as not implemented.
func Lacks(ops ...s3fault.Op) Habit {
	return Refuse(
		Match{Ops: ops},
		http.StatusNotImplemented,
		"NotImplemented",
		"A header or query you provided implies functionality that is not implemented.",
		nil,
	)
}

// writes are the operations that give a key another content.
var writes = []s3fault.Op{s3fault.PutObject, s3fault.CopyObject, s3fault.CompleteMultipartUpload}

// RatePerKey takes one write of a key in each interval and refuses others with
// HTTP 429.
func RatePerKey(interval time.Duration) Habit {
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

// RewritesAcceptEncoding gives the field Accept-Encoding another value on the
// way, as front ends that compress do. A signature that covers it is then wrong.
func RewritesAcceptEncoding() Habit {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			r.Header.Set("Accept-Encoding", "gzip, br, rewritten")
			return next(r)
		}
	}
}

// WantsContentMD5 refuses DeleteObjects without the field Content-MD5.
func WantsContentMD5(code string) Habit {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			if r.Op == s3fault.DeleteObjects && r.Header.Get("Content-Md5") == "" {
				return Refusal(http.StatusBadRequest, code, "Missing required header for this request: Content-MD5")
			}
			return next(r)
		}
	}
}

// Ignores drops a field of the request, as a server does that does not know it.
func Ignores(field string, ops ...s3fault.Op) Habit {
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
func UnderPath(path string) Habit {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			rest, found := strings.CutPrefix(r.URL.Path, path)
			if !found || rest == "" {
				return Refusal(http.StatusNotFound, "NoSuchPath", "There is nothing at this path.")
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

// editList changes the entries of the listings that the server answers with.
func editList(change func(r *Request, entries []string) []string) Habit {
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

// UnorderedLists orders each page of a list by a hash of the keys.
func UnorderedLists() Habit {
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

// BlindLists answers lists of a prefix that matches with no object at all.
func BlindLists(prefix *regexp.Regexp) Habit {
	return editList(func(r *Request, entries []string) []string {
		if prefix.MatchString(r.URL.Query().Get("prefix")) {
			return nil
		}
		return entries
	})
}

// OtherETags gives each object the ETag of an upload in parts, as a store does
// that splits objects by itself. It translates conditions back.
func OtherETags() Habit {
	const suffix = "-1"
	strip := func(value string) string {
		if !strings.Contains(value, "-") && value != "*" {
			return `"of no object"` // its objects have no such ETag
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

// ListsOtherETags has lists give another ETag than everything else does.
func ListsOtherETags() Habit {
	return editList(func(_ *Request, entries []string) []string {
		for i := range entries {
			entries[i] = etagIn.ReplaceAllString(entries[i], "<ETag>&quot;${2}-l&quot;</ETag>")
		}
		return entries
	})
}

// ListsPlus encodes the keys of lists, but a plus, which then reads as a space.
func ListsPlus() Habit {
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

// LosesDeletes confirms deletes among many of keys that match, and makes none of
// them.
func LosesDeletes(key *regexp.Regexp) Habit {
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
			sum := md5.Sum(r.Body) // versitygw wants a digest of the body
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

// DecodesSourceTwice reads the name of a copy's source as if it were encoded once
// more than it is.
func DecodesSourceTwice() Habit {
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

// TakesKeys refuses to write keys that do not match.
func TakesKeys(pattern *regexp.Regexp) Habit {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			makes := slices.Contains(writes, r.Op) || r.Op == s3fault.CreateMultipartUpload
			if makes && !pattern.MatchString(r.Key) {
				return Refusal(http.StatusBadRequest, "InvalidKey", "Invalid key: "+r.Key)
			}
			return next(r)
		}
	}
}

// RefusesTags refuses writes that come with tags.
func RefusesTags(status int, code string) Habit {
	return func(next Handler) Handler {
		return func(r *Request) *s3fault.Answer {
			if r.Header.Get("X-Amz-Tagging") != "" {
				return Refusal(status, code, "Header 'x-amz-tagging' with value not implemented")
			}
			return next(r)
		}
	}
}

// OwnETags gives objects that were written at once ETags that look like MD5s and are
// none: they depend on the key. It translates conditions back.
func OwnETags() Habit {
	turn := func(key, tag string) string { // and back
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

// Full refuses all that takes space, and answers reads and deletes.
func Full(status int, code string) Habit {
	return Refuse(Match{Ops: []s3fault.Op{
		s3fault.PutObject, s3fault.CopyObject, s3fault.CreateMultipartUpload, s3fault.UploadPart,
		s3fault.UploadPartCopy, s3fault.CompleteMultipartUpload,
	}}, status, code, "There is no space left on the store.", nil)
}

// Versioned adds the fields that a bucket with versions sends.
func Versioned() Habit {
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

// Archived refuses to read or copy objects whose key matches, as a store does for
// those of an archive class.
func Archived(key *regexp.Regexp) Habit {
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

// Answers gives the successful answers of an operation another status.
func Answers(op s3fault.Op, status int) Habit {
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
