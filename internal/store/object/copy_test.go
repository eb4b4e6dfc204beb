package object_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

func TestSplit(t *testing.T) {
	const (
		mib = int64(1) << 20
		gib = int64(1) << 30
	)
	for _, c := range []struct {
		parts object.CopyParts
		size  int64
		n     int
		each  int64
	}{
		{object.CopyParts{}, 0, 0, 0},
		{object.CopyParts{}, 256 * mib, 0, 0},
		{object.CopyParts{}, 256*mib + 1, 3, 128 * mib},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 0, 0, 0},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 1, 0, 0},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 2, 1, 5 * mib},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 5*mib - 1, 1, 5 * mib},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 5 * mib, 1, 5 * mib},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 5*mib + 1, 2, 5 * mib},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 50_000 * mib, 10_000, 5 * mib},
		{object.CopyParts{Threshold: 1, PartSize: 5 * mib}, 50_000*mib + 1, 10_000, 5*mib + 1},
		// S3 copies at most 5 GiB in one request, regardless of the threshold.
		{object.CopyParts{Threshold: 1 << 50, PartSize: 5 * gib}, 5*gib - 1, 0, 0},
		{object.CopyParts{Threshold: 1 << 50, PartSize: 5 * gib}, 5 * gib, 0, 0},
		{object.CopyParts{Threshold: 1 << 50, PartSize: 5 * gib}, 5*gib + 1, 2, 5 * gib},
		{object.CopyParts{Threshold: 1 << 50, PartSize: 5 * mib}, 50_000 * gib, 10_000, 5 * gib},
	} {
		n, each := c.parts.Split(c.size)
		if n != c.n || each != c.each {
			t.Errorf("%d bytes by %+v: %d parts of %d, want %d of %d", c.size, c.parts, n, each, c.n, c.each)
		}
		if n > 0 && (int64(n)*each < c.size || int64(n-1)*each >= c.size) {
			t.Errorf("%d bytes do not fit into %d parts of %d", c.size, n, each)
		}
	}
}

func TestCopyRequestCheck(t *testing.T) {
	good := object.CopyRequest{From: "a", To: "b", SourceETag: "e", Size: 1}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, key := range map[string]func(*object.CopyRequest){
		"from":        func(r *object.CopyRequest) { r.From = "/a" },
		"to":          func(r *object.CopyRequest) { r.To = "b/../c" },
		"onto itself": func(r *object.CopyRequest) { r.To = "a" },
	} {
		r := good
		r.SourceETag = "" // keys are checked first
		key(&r)
		if err := r.Check(); !errors.Is(err, object.ErrInvalidKey) {
			t.Errorf("%s: err = %v, want ErrInvalidKey", name, err)
		}
	}
}

func TestProvedEqual(t *testing.T) {
	const (
		plain = "5d41402abc4b2a76b9719d911017c592"
		other = "7d793037a0760186574b0282f2f435e7"
		parts = "5d41402abc4b2a76b9719d911017c592-3"
		crc   = "CRC64NVME:AAAAAAAAAAA="
		crc2  = "CRC64NVME:AAAAAAAAAAE="
		sha   = "SHA256:AAAAAAAAAAA="
	)
	for _, c := range []struct {
		name           string
		source, target object.Info
		want           bool
	}{
		{"nothing known", object.Info{}, object.Info{}, false},
		{"sizes alone", object.Info{Size: 3}, object.Info{Size: 3}, false},
		{"same MD5", object.Info{Size: 3, ETag: plain}, object.Info{Size: 3, ETag: plain}, true},
		{"same MD5, other size", object.Info{Size: 3, ETag: plain}, object.Info{Size: 4, ETag: plain}, false},
		{"other MD5", object.Info{Size: 3, ETag: plain}, object.Info{Size: 3, ETag: other}, false},
		{"other keys", object.Info{Key: "a", ETag: plain}, object.Info{Key: "b", ETag: plain}, true},
		{"same ETag of parts", object.Info{ETag: parts}, object.Info{ETag: parts}, false},
		{"same ETag, not an MD5", object.Info{ETag: "3-17f-2a"}, object.Info{ETag: "3-17f-2a"}, false},
		{"same short ETag", object.Info{ETag: "0"}, object.Info{ETag: "0"}, false},
		{
			"same long ETag, not hex",
			object.Info{ETag: strings.Repeat("x", 32)},
			object.Info{ETag: strings.Repeat("x", 32)},
			false,
		},
		{"same ETag under KMS", object.Info{ETag: plain, OpaqueETag: true}, object.Info{ETag: plain}, false},
		{"same ETag, target under KMS", object.Info{ETag: plain}, object.Info{ETag: plain, OpaqueETag: true}, false},
		{"same checksum", object.Info{ETag: parts, Checksum: crc}, object.Info{ETag: plain, Checksum: crc}, true},
		{"same checksum, other size", object.Info{Size: 1, Checksum: crc}, object.Info{Checksum: crc}, false},
		{"other checksum", object.Info{ETag: plain, Checksum: crc}, object.Info{ETag: plain, Checksum: crc2}, false},
		{"other type of checksum", object.Info{Checksum: crc}, object.Info{Checksum: sha}, false},
		{
			"other type of checksum, same MD5",
			object.Info{ETag: plain, Checksum: crc},
			object.Info{ETag: plain, Checksum: sha},
			true,
		},
		{"one checksum, same MD5", object.Info{ETag: plain, Checksum: crc}, object.Info{ETag: plain}, true},
		{"one checksum", object.Info{ETag: parts, Checksum: crc}, object.Info{ETag: plain}, false},
		{"checksum without a type", object.Info{Checksum: "AAAA"}, object.Info{Checksum: "AAAA"}, false},
		{"copy in parts", object.Info{ETag: plain}, object.Info{ETag: parts, SourceETag: plain}, true},
		{"copy in parts of parts", object.Info{ETag: parts}, object.Info{ETag: "1-2", SourceETag: parts}, true},
		{
			"copy in parts under KMS",
			object.Info{ETag: plain, OpaqueETag: true},
			object.Info{ETag: parts, SourceETag: plain, OpaqueETag: true},
			true,
		},
		{"copy in parts, other size", object.Info{Size: 1, ETag: plain}, object.Info{
			Size: 2, ETag: parts,
			SourceETag: plain,
		}, false},
		{"copy in parts of another", object.Info{ETag: plain}, object.Info{ETag: parts, SourceETag: other}, false},
		{
			"copy in parts of the same, other checksum",
			object.Info{ETag: plain, Checksum: crc},
			object.Info{ETag: parts, SourceETag: plain, Checksum: crc2},
			false,
		},
		{"inherited source ETag", object.Info{ETag: plain}, object.Info{ETag: other, SourceETag: plain}, false},
		{"copy of a copy", object.Info{ETag: parts, SourceETag: plain}, object.Info{ETag: other, SourceETag: plain}, false},
		{"source that is a copy of the target", object.Info{ETag: parts, SourceETag: plain}, object.Info{ETag: plain}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := object.ProvedEqual(c.source, c.target); got != c.want {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

func TestSameETag(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"5d41402abc4b2a76b9719d911017c592", "5d41402abc4b2a76b9719d911017c592", true},
		{"5d41402abc4b2a76b9719d911017c592", "5d41402abc4b2a76b9719d911017c593", false},
		{"5d41402abc4b2a76b9719d911017c592-2", "5d41402abc4b2a76b9719d911017c592-3", false},
		{"5d41402abc4b2a76b9719d911017c592-2", "5d41402abc4b2a76b9719d911017c592", false},
		// A directory store, now and in earlier releases.
		{"f-18ab", "f-18ab", true},
		{"f-18ab", "f-18ac", false},
		{"f-18ab", "e-18ab", false},
		{"f-18ab-77", "f-18ab", true},
		{"f-18ab", "f-18ab-77", true},
		{"f-18ab-77", "f-18ab-78", true},
		{"f-18ab-77", "f-18ac", false},
		{"f-18ac-77", "f-18ab-77", false},
		// Not an ETag of a directory store.
		{"f-18ab-7z", "f-18ab", false},
		{"F-18ab-77", "F-18ab", false},
		{"f-18ab-", "f-18ab", false},
		{"f--77", "f-", false},
		{"f-18ab-77-1", "f-18ab", false},
		{"5d41402abc4b2a76b9719d911017c592-2-1", "5d41402abc4b2a76b9719d911017c592-2", false},
	} {
		if got := object.SameETag(c.a, c.b); got != c.same {
			t.Errorf("%q and %q: %v, want %v", c.a, c.b, got, c.same)
		}
	}
}
