package server

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// FuzzToken decodes any text as a token. Only an encoded token is decoded, for its own
// method, filters, cluster and count of numbers.
func FuzzToken(f *testing.F) {
	filters := filterHash(&pb.ListSnapshotsRequest{Db: "db"})
	s := pageTokenCodec{[]byte("key")}
	f.Add("", []byte{}, "M")
	f.Add(s.seal("M", filters, 1), []byte{2}, "M")
	f.Add(s.seal("M", filters), []byte{}, "N")
	f.Add("AQI", []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1}, "M\x00N")
	f.Add("AQI=", []byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1}, "")
	f.Fuzz(func(t *testing.T, token string, data []byte, method string) {
		var numbers []int64
		for len(data) > 0 {
			n, size := binary.Varint(data)
			if size <= 0 {
				break
			}
			numbers, data = append(numbers, n), data[size:]
		}
		open := func(s pageTokenCodec, token, method string, filters [32]byte, count int) ([]int64, bool) {
			got := make([]int64, count)
			into := make([]*int64, count)
			for i := range got {
				into[i] = &got[i]
			}
			return got, s.open(token, method, filters, into...)
		}
		sealed := s.seal(method, filters, numbers...)
		if got, ok := open(s, sealed, method, filters, len(numbers)); !ok || !slices.Equal(got, numbers) {
			t.Fatalf("%v is decoded as %v, %v", numbers, got, ok)
		}
		other := filterHash(&pb.ListSnapshotsRequest{Db: "db", NamePrefix: "x"})
		for name, opened := range map[string]bool{
			"another method":  second(open(s, sealed, method+"x", filters, len(numbers))),
			"other filters":   second(open(s, sealed, method, other, len(numbers))),
			"another cluster": second(open(pageTokenCodec{[]byte("kez")}, sealed, method, filters, len(numbers))),
			"more numbers":    second(open(s, sealed, method, filters, len(numbers)+1)),
			"fewer numbers":   len(numbers) > 0 && second(open(s, sealed, method, filters, len(numbers)-1)),
		} {
			if opened {
				t.Errorf("%q was decoded for %s", sealed, name)
			}
		}
		if got, ok := open(s, token, method, filters, len(numbers)); ok && token != s.seal(method, filters, got...) {
			t.Errorf("%q was decoded as %v, which is encoded as %q", token, got, s.seal(method, filters, got...))
		}
		// Any changed bit makes the token invalid.
		raw, err := base64.RawURLEncoding.DecodeString(sealed)
		if err != nil {
			t.Fatal(err)
		}
		for i := range raw {
			forged := bytes.Clone(raw)
			forged[i] ^= 1 << (len(token) % 8)
			if second(open(s, base64.RawURLEncoding.EncodeToString(forged), method, filters, len(numbers))) {
				t.Errorf("byte %d of %q is not authenticated", i, sealed)
			}
		}
	})
}

func second(_ []int64, ok bool) bool { return ok }

// FuzzFilterHash decodes any bytes as a request. Its hash depends neither on its paging
// nor on its encoding, and the hash of its request token not on the token.
func FuzzFilterHash(f *testing.F) {
	for _, m := range []proto.Message{
		&pb.ListSnapshotsRequest{}, &pb.ListSnapshotsRequest{
			Db: "d", PageSize: 3, PageToken: "t",
			Labels: map[string]string{"a": "b", "c": "d"},
		},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, int32(7), "token")
	}
	f.Fuzz(func(t *testing.T, data []byte, size int32, token string) {
		req := &pb.ListSnapshotsRequest{}
		if proto.Unmarshal(data, req) != nil {
			return
		}
		before := proto.Clone(req)
		want := filterHash(req)
		if !proto.Equal(before, req) {
			t.Fatal("the request was changed")
		}
		req.PageSize, req.PageToken = size, string(bytes.ToValidUTF8([]byte(token), nil))
		if filterHash(req) != want {
			t.Error("another page has another hash")
		}
		again, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		decoded := &pb.ListSnapshotsRequest{}
		if err := proto.Unmarshal(again, decoded); err != nil {
			t.Fatal(err)
		}
		if filterHash(decoded) != want {
			t.Error("the same request has another hash")
		}
		decoded.Db += "x"
		if filterHash(decoded) == want {
			t.Error("other filters have the same hash")
		}
	})
}

// FuzzZeroPadIDs pads the numbers of any key. A second time changes nothing, and other
// text is unchanged.
func FuzzZeroPadIDs(f *testing.F) {
	for _, key := range []string{
		"", "/", "5", "/a/5", "/a/0000000000000000005/b", "/a/12345678901234567890",
		"/a/-5/5x/٣", "\xff/1",
	} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		got := zeroPadIDs(key)
		if again := zeroPadIDs(got); again != got {
			t.Errorf("%q became %q, and then %q", key, got, again)
		}
		if bytes.Count([]byte(key), []byte("/")) != bytes.Count([]byte(got), []byte("/")) {
			t.Errorf("%q became %q", key, got)
		}
	})
}
