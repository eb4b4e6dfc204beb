package main

import (
	"strings"
	"testing"
)

func TestMask(t *testing.T) {
	for _, same := range [][]string{
		{"snapshot 449182736455000001", "snapshot 1234", "snapshot deadbeef01"},
		{"at 2026-11-22T15:04:05.123Z", "at 2031-01-01 00:00:00 UTC", "at 2026-11-22 15:04"},
		{"on 2026-11-22", "on 1999-01-01"},
		{"took 1.2s", "took 1h30m", "took 15µs", "took 0s"},
		{"12.3 MiB", "1 B", "9KB"},
		{"listening on 127.0.0.1:7070", "listening on localhost:39123", "listening on [::]:80"},
		{"snapshotd 3a297d9f4e7b", "snapshotd v0.1.0-3-g3a297d9f4e7b", "snapshotd 3a297d9f4e7b-dirty"},
		{"data in /tmp/docscheck-123/work/data", "data in /tmp/snapshotd-docs/data"},
		{"NAME   STATE", "NAME STATE  "},
		{"------- --", "---- --"},
		{`  "id":  "1234",`, `"id": "99999",`, `"id":"99999",`},
		{"next: CAESEAoIc25hcHNob3QQARgC", "next: Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MA=="},
		{"0b6f1c9e-6a43-4a7d-9f2e-5c1f0c6f3a10", "42424242"},
	} {
		for _, other := range same[1:] {
			if a, b := mask(same[0]), mask(other); a != b {
				t.Errorf("mask(%q) = %q, mask(%q) = %q; want the same", same[0], a, other, b)
			}
		}
	}
	for _, different := range [][2]string{
		{"3 rows", "4 rows"},
		{"COMMITTED", "PENDING"},
		{"took 3s", "took 3 MiB"},
		{"2026-11-22", "12 MiB"},
		{"version 3", "version 4"},
		{"snapshotd_restore_jobs_total 2", "snapshotd_restore_jobs_total 3"},
		{"a b", "ab"},
	} {
		if a, b := mask(different[0]), mask(different[1]); a == b {
			t.Errorf("mask(%q) = mask(%q) = %q; want them different", different[0], different[1], a)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		want, got string
		ok        bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "", false},
		{"a", "a", true},
		{"\na\n\n", "a", true},
		{"a\nb", "a\nc", false},
		{"a\nb", "a", false},
		{"a", "a\nb", false},
		{"...", "", true},
		{"...", "a\nb", true},
		{"a\n...", "a", true},
		{"a\n...", "b\na", false},
		{"...\nz", "a\nz\nb\nz", true},
		{"...\nz", "a\nz\nb", false},
		{"a\n...\nc\n...\ne", "a\nb\nc\nc\nd\ne", true},
		{"a\n...\nc\n...\ne", "a\nb\nd\ne", false},
		{"id 1234", "id 5678", true},
	} {
		if got := matches(strings.Split(tc.want, "\n"), strings.Split(tc.got, "\n")); got != tc.ok {
			t.Errorf("matches(%q, %q) = %v, want %v", tc.want, tc.got, got, tc.ok)
		}
	}
}
