package object_test

import (
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

func TestCompare(t *testing.T) {
	const (
		md5, other = "5d41402abc4b2a76b9719d911017c592", "7d793037a0760186574b0282f2f435e7"
		md5Sum     = "MD5:XUFAKrxLKna5cZ2REBfFkg==" // of md5
		crc, crc2  = "CRC64NVME:AAAAAAAAAAA=", "CRC64NVME:AAAAAAAAAAE="
		sha        = "SHA256:LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="
	)
	for _, c := range []struct {
		name          string
		recorded, now object.Info
		want          object.Likeness
		reason        string // a part of it
	}{
		{"size", object.Info{Size: 1, ETag: md5}, object.Info{Size: 2, ETag: md5}, object.Altered, "2 bytes, not 1"},
		{
			"size and layout",
			object.Info{Size: 1, ETag: md5},
			object.Info{Size: 2, ETag: other + "-2"},
			object.Altered,
			"2 bytes",
		},
		{"checksum", object.Info{ETag: md5, Checksum: crc}, object.Info{ETag: md5, Checksum: crc2}, object.Altered, crc2},
		{
			"checksum and layout",
			object.Info{ETag: md5, Checksum: crc},
			object.Info{ETag: other + "-2", Checksum: crc2},
			object.Altered, crc2,
		},
		{"checksum alone", object.Info{Checksum: crc}, object.Info{ETag: md5, Checksum: crc2}, object.Altered, crc2},
		{"nothing", object.Info{}, object.Info{}, object.NotCompared, ""},
		{"no ETag recorded", object.Info{}, object.Info{ETag: md5, Checksum: crc}, object.NotCompared, ""},
		{
			"no ETag recorded, checksum of another type",
			object.Info{Checksum: sha},
			object.Info{ETag: md5, Checksum: crc},
			object.NotCompared, "",
		},
		{
			"no ETag recorded, equal checksum",
			object.Info{Checksum: crc},
			object.Info{ETag: md5, Checksum: crc},
			object.Equal,
			"",
		},
		{"ETag missing", object.Info{ETag: md5}, object.Info{}, object.NotCompared, ""},
		{"MD5", object.Info{ETag: md5}, object.Info{ETag: md5}, object.Equal, ""},
		{"another MD5", object.Info{ETag: md5}, object.Info{ETag: other}, object.Altered, "content was replaced"},
		{"parts", object.Info{ETag: md5 + "-3"}, object.Info{ETag: md5 + "-3"}, object.Equal, ""},
		{
			"MD5, now parts",
			object.Info{ETag: md5},
			object.Info{ETag: other + "-2"},
			object.OtherLayout,
			"no checksum was registered",
		},
		{
			"parts, now an MD5",
			object.Info{ETag: other + "-2"},
			object.Info{ETag: md5},
			object.OtherLayout,
			"2 parts of the previous size",
		},
		{"more parts", object.Info{ETag: other + "-2"}, object.Info{ETag: md5 + "-3"}, object.OtherLayout, "3 parts"},
		{
			"equal number of parts",
			object.Info{ETag: other + "-2"},
			object.Info{ETag: md5 + "-2"},
			object.NotKnown,
			"parts of another size",
		},
		{"one part", object.Info{ETag: other + "-1"}, object.Info{ETag: md5 + "-1"}, object.Altered, "content was replaced"},
		{
			"as many parts, equal checksum",
			object.Info{ETag: other + "-2", Checksum: crc},
			object.Info{ETag: md5 + "-2", Checksum: crc},
			object.OtherLayout, "checksum CRC64NVME is equal",
		},
		{
			"other parts, no checksum kept",
			object.Info{ETag: other + "-2", Checksum: crc},
			object.Info{ETag: md5 + "-3"},
			object.OtherLayout, "the store has no checksum",
		},
		{
			"other parts, checksum of another type",
			object.Info{ETag: other + "-2", Checksum: sha},
			object.Info{ETag: md5 + "-3", Checksum: crc},
			object.OtherLayout, "cannot be compared",
		},
		{
			"type in lower case",
			object.Info{ETag: md5, Checksum: "crc64nvme:AAAAAAAAAAA="},
			object.Info{ETag: other + "-2", Checksum: crc},
			object.OtherLayout, "is equal",
		},
		{
			"registered MD5",
			object.Info{ETag: other + "-2", Checksum: md5Sum},
			object.Info{ETag: md5},
			object.OtherLayout,
			"checksum MD5 is equal",
		},
		{
			"registered MD5, another",
			object.Info{ETag: other + "-2", Checksum: md5Sum},
			object.Info{ETag: other},
			object.Altered, "checksum",
		},
		{
			"registered MD5, encrypted",
			object.Info{Checksum: md5Sum},
			object.Info{ETag: other, OpaqueETag: true},
			object.NotCompared, "",
		},
		{"encrypted", object.Info{ETag: md5}, object.Info{ETag: other, OpaqueETag: true}, object.OtherLayout, "encrypted"},
		{"directory", object.Info{ETag: "f-18ab"}, object.Info{ETag: "f-18ab"}, object.Equal, ""},
		{
			"directory, inode of earlier releases",
			object.Info{ETag: "f-18ab-77"},
			object.Info{ETag: "f-18ab"},
			object.Equal,
			"",
		},
		{
			"directory, other time",
			object.Info{ETag: "f-18ab-77"},
			object.Info{ETag: "f-18ac"},
			object.NotKnown,
			"modification time",
		},
		{
			"directory, now in a bucket",
			object.Info{ETag: "f-18ab"},
			object.Info{ETag: md5},
			object.OtherLayout,
			"of a directory",
		},
		{
			"bucket, now a directory",
			object.Info{ETag: md5},
			object.Info{ETag: "f-18ab"},
			object.OtherLayout,
			"one request, not in parts",
		},
		{"private layout", object.Info{ETag: "CJ7="}, object.Info{ETag: "CJ8="}, object.NotKnown, "equal or other"},
		{
			"private layout, now an MD5",
			object.Info{ETag: "CJ7="},
			object.Info{ETag: md5},
			object.OtherLayout,
			"private layout",
		},
		{
			"no number of parts",
			object.Info{ETag: md5 + "-0"},
			object.Info{ETag: md5 + "-10001"},
			object.NotKnown,
			"equal or other",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, reason := object.Compare(c.recorded, c.now)
			if got != c.want || !strings.Contains(reason, c.reason) || (reason == "") == got.Refused() {
				t.Errorf("%v: %q; want %v: %q", got, reason, c.want, c.reason)
			}
			if named := strings.Contains(reason, "ETag of another layout"); named != (c.want == object.OtherLayout) {
				t.Errorf("%v has reason %q", c.want, reason)
			}
		})
	}
}
