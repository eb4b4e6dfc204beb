package server

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/snapshotd/snapshotd/internal/store/request"
)

// Page and resume tokens are a version, numbers, and a MAC that binds them to
// the cluster, the method and the filters of the request, in base64url. Their content
// is private to this package.
const (
	tokenVersion = 1
	macBytes     = 16
)

// pageTokenCodec encodes and decodes page and resume tokens.
type pageTokenCodec struct{ key []byte }

// seal encodes numbers as a token.
func (s pageTokenCodec) seal(method string, filters [sha256.Size]byte, numbers ...int64) string {
	data := []byte{tokenVersion}
	for _, n := range numbers {
		data = binary.AppendVarint(data, n)
	}
	return base64.RawURLEncoding.EncodeToString(append(data, s.mac(method, filters, data)...))
}

// open decodes the numbers of a token. It reports false for a token of another method,
// other filters or another cluster.
func (s pageTokenCodec) open(token, method string, filters [sha256.Size]byte, numbers ...*int64) bool {
	data, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(data) < 1+macBytes {
		return false
	}
	data, mac := data[:len(data)-macBytes], data[len(data)-macBytes:]
	if !hmac.Equal(mac, s.mac(method, filters, data)) || data[0] != tokenVersion {
		return false
	}
	data = data[1:]
	for _, n := range numbers {
		value, size := binary.Varint(data)
		if size <= 0 {
			return false
		}
		*n, data = value, data[size:]
	}
	return len(data) == 0
}

func (s pageTokenCodec) mac(method string, filters [sha256.Size]byte, data []byte) []byte {
	h := hmac.New(sha256.New, s.key)
	h.Write([]byte(method))
	h.Write([]byte{0})
	h.Write(filters[:])
	h.Write(data)
	return h.Sum(nil)[:macBytes]
}

// filterHash returns the hash of a request without its paging.
func filterHash(req proto.Message) [sha256.Size]byte {
	return hashWithout(req, "page_size", "page_token", "resume_token")
}

// requestToken returns the caller's request token with the hash of the request.
func requestToken(principal, method string, req interface {
	proto.Message
	GetRequestToken() string
},
) request.Token {
	value := req.GetRequestToken()
	if value == "" {
		return request.Token{}
	}
	hash := hashWithout(req, "request_token")
	return request.Token{Principal: principal, Method: method, Value: value, Hash: hash[:]}
}

// hashWithout returns the SHA-256 of req without some of its fields.
func hashWithout(req proto.Message, fields ...protoreflect.Name) [sha256.Size]byte {
	req = proto.Clone(req)
	m := req.ProtoReflect()
	for _, name := range fields {
		if f := m.Descriptor().Fields().ByName(name); f != nil {
			m.Clear(f)
		}
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
	if err != nil {
		// A decoded message can always be encoded.
		panic("server: encode a request: " + err.Error())
	}
	return sha256.Sum256(data)
}
