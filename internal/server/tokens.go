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
// the cluster, the method and the filters of the request, in base64url. What
// they hold is nobody's business but this package's.
const (
	tokenVersion = 1
	macBytes     = 16
)

// sealer makes and opens tokens.
type sealer struct{ key []byte }

// seal returns a token that holds numbers.
func (s sealer) seal(method string, filters [sha256.Size]byte, numbers ...int64) string {
	data := []byte{tokenVersion}
	for _, n := range numbers {
		data = binary.AppendVarint(data, n)
	}
	return base64.RawURLEncoding.EncodeToString(append(data, s.mac(method, filters, data)...))
}

// open fills numbers from a token of the same method and filters.
func (s sealer) open(token, method string, filters [sha256.Size]byte, numbers ...*int64) bool {
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

func (s sealer) mac(method string, filters [sha256.Size]byte, data []byte) []byte {
	h := hmac.New(sha256.New, s.key)
	h.Write([]byte(method))
	h.Write([]byte{0})
	h.Write(filters[:])
	h.Write(data)
	return h.Sum(nil)[:macBytes]
}

// filterHash is the hash of a request without its paging: of what it asks for.
func filterHash(req proto.Message) [sha256.Size]byte {
	return hashWithout(req, "page_size", "page_token", "resume_token")
}

// requestToken returns the caller's request token with what it stands for.
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

// hashWithout is the SHA-256 of req without some of its fields.
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
		// It was decoded from bytes, so it can be encoded.
		panic("server: encode a request: " + err.Error())
	}
	return sha256.Sum256(data)
}
