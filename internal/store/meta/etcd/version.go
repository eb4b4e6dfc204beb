package etcd

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// minimums are the oldest supported releases of etcd, one per minor version. Releases newer
// than the last minor version are supported, all others are refused. Before 3.4.25 and 3.5.8
// a progress report may precede its events, so that a watch misses them; later ones have
// security fixes. docs/operations.md has the same list, and a test compares the two.
var minimums = []version{{3, 6, 14}, {3, 7, 1}}

// version is a release of etcd.
type version struct{ major, minor, patch int }

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v.major, v.minor, v.patch) }

func (v version) compare(o version) int {
	return cmp.Or(cmp.Compare(v.major, o.major), cmp.Compare(v.minor, o.minor), cmp.Compare(v.patch, o.patch))
}

// MinimumVersions returns the oldest supported releases.
func MinimumVersions() string {
	var names []string
	for _, v := range minimums {
		names = append(names, v.String())
	}
	return strings.Join(names, " / ")
}

// newEnough reports whether a server of the version may be used. An unreadable version may
// not, and a release candidate is older than its release.
func newEnough(text string) bool {
	v, candidate, ok := parseVersion(text)
	if !ok {
		return false
	}
	if candidate {
		v.patch-- // a candidate of x.y.0 is less than any release of x.y
	}
	for _, minimum := range minimums {
		if v.major == minimum.major && v.minor == minimum.minor {
			return v.compare(minimum) >= 0
		}
	}
	newest := slices.MaxFunc(minimums, version.compare)
	return v.major > newest.major || v.major == newest.major && v.minor > newest.minor
}

// parseVersion parses a version such as 3.6.14, 3.7.0-rc.1 or 3.6.14+vendor.
func parseVersion(text string) (v version, candidate, ok bool) {
	text, _, _ = strings.Cut(strings.TrimPrefix(text, "v"), "+")
	text, _, candidate = strings.Cut(text, "-")
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return version{}, false, false
	}
	for i, field := range []*int{&v.major, &v.minor, &v.patch} {
		n, err := strconv.ParseUint(parts[i], 10, 16)
		if err != nil {
			return version{}, false, false
		}
		*field = int(n)
	}
	return v, candidate, true
}
