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

// FuzzToken opens anything as a token. It opens what it has sealed, for as many
// numbers, and nothing else: not for another method, filters, cluster or count, and
// no other text.
func FuzzToken(f *testing.F) {
	filters := filterHash(&pb.ListSnapshotsRequest{Db: "db"})
	s := sealer{[]byte("key")}
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
		open := func(s sealer, token, method string, filters [32]byte, count int) ([]int64, bool) {
			got := make([]int64, count)
			into := make([]*int64, count)
			for i := range got {
				into[i] = &got[i]
			}
			return got, s.open(token, method, filters, into...)
		}
		sealed := s.seal(method, filters, numbers...)
		if got, ok := open(s, sealed, method, filters, len(numbers)); !ok || !slices.Equal(got, numbers) {
			t.Fatalf("%v is opened as %v, %v", numbers, got, ok)
		}
		other := filterHash(&pb.ListSnapshotsRequest{Db: "db", NamePrefix: "x"})
		for name, opened := range map[string]bool{
			"another method":  second(open(s, sealed, method+"x", filters, len(numbers))),
			"other filters":   second(open(s, sealed, method, other, len(numbers))),
			"another cluster": second(open(sealer{[]byte("kez")}, sealed, method, filters, len(numbers))),
			"more numbers":    second(open(s, sealed, method, filters, len(numbers)+1)),
			"fewer numbers":   len(numbers) > 0 && second(open(s, sealed, method, filters, len(numbers)-1)),
		} {
			if opened {
				t.Errorf("%q was opened for %s", sealed, name)
			}
		}
		if got, ok := open(s, token, method, filters, len(numbers)); ok && token != s.seal(method, filters, got...) {
			t.Errorf("%q was opened as %v, which is sealed as %q", token, got, s.seal(method, filters, got...))
		}
		// A bit of it, whatever the bit means.
		raw, err := base64.RawURLEncoding.DecodeString(sealed)
		if err != nil {
			t.Fatal(err)
		}
		for i := range raw {
			forged := bytes.Clone(raw)
			forged[i] ^= 1 << (len(token) % 8)
			if second(open(s, base64.RawURLEncoding.EncodeToString(forged), method, filters, len(numbers))) {
				t.Errorf("byte %d of %q is not bound", i, sealed)
			}
		}
	})
}

func second(_ []int64, ok bool) bool { return ok }

// FuzzFilterHash reads anything as a request. Its hash does not change with its
// paging, nor when it is decoded again, and the hash under its request token does not
// change with that.
func FuzzFilterHash(f *testing.F) {
	for _, m := range []proto.Message{
		&pb.ListSnapshotsRequest{}, &pb.ListSnapshotsRequest{Db: "d", PageSize: 3, PageToken: "t", Labels: map[string]string{"a": "b", "c": "d"}},
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

// FuzzPadded writes the numbers in any key as they are stored: once is enough, and what
// is no number stays.
func FuzzPadded(f *testing.F) {
	for _, key := range []string{"", "/", "5", "/a/5", "/a/0000000000000000005/b", "/a/12345678901234567890", "/a/-5/5x/٣", "\xff/1"} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		got := padded(key)
		if again := padded(got); again != got {
			t.Errorf("%q became %q, and that %q", key, got, again)
		}
		if bytes.Count([]byte(key), []byte("/")) != bytes.Count([]byte(got), []byte("/")) {
			t.Errorf("%q became %q", key, got)
		}
	})
}
