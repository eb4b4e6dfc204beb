package cli

import (
	"errors"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// parseCollection parses the name of a collection: NAME, DB/NAME or #ID. The server
// validates names.
func parseCollection(s string) (*snapshotdv1.CollectionRef, error) {
	if rest, ok := strings.CutPrefix(s, "#"); ok {
		id, err := parseID(rest)
		if err != nil {
			return nil, err
		}
		return idRef(id), nil
	}
	db, name, qualified := strings.Cut(s, "/")
	if !qualified {
		db, name = "", s
	}
	if name == "" || qualified && db == "" || strings.Contains(name, "/") {
		return nil, usageErrorf("%q is not a collection: use NAME, DB/NAME or '#ID'", s)
	}
	return &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Name{
		Name: &snapshotdv1.CollectionName{Db: db, Name: name},
	}}, nil
}

// parseSnapshot parses the name of a snapshot: NAME or #ID. A name may consist of
// digits.
func parseSnapshot(s string) (*snapshotdv1.SnapshotRef, error) {
	if rest, ok := strings.CutPrefix(s, "#"); ok {
		id, err := parseID(rest)
		if err != nil {
			return nil, err
		}
		return &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Id{Id: id}}, nil
	}
	if s == "" {
		return nil, usageErrorf("the name of a snapshot must not be empty")
	}
	return &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Name{Name: s}}, nil
}

func parseID(s string) (int64, error) {
	id, err := strconv.ParseUint(s, 10, 63)
	if err != nil || id == 0 {
		return 0, usageErrorf("%q is not an id: ids are positive numbers", s)
	}
	return int64(id), nil
}

func parseIDs(args []string) ([]int64, error) {
	var ids []int64
	for _, arg := range args {
		for s := range strings.SplitSeq(arg, ",") {
			id, err := parseID(s)
			if err != nil {
				return nil, err
			}
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// parseLabels parses key=value pairs.
func parseLabels(args []string) (map[string]string, error) {
	var labels map[string]string
	for _, arg := range args {
		k, v, ok := strings.Cut(arg, "=")
		if !ok || k == "" {
			return nil, usageErrorf("label %q: use KEY=VALUE", arg)
		}
		if _, duplicate := labels[k]; duplicate {
			return nil, usageErrorf("label %q is given twice", k)
		}
		if labels == nil {
			labels = make(map[string]string)
		}
		labels[k] = v
	}
	return labels, nil
}

// parsePositions parses shard=timestamp pairs.
func parsePositions(args []string) ([]*snapshotdv1.ChannelPosition, error) {
	var ps []*snapshotdv1.ChannelPosition
	seen := make(map[uint64]bool)
	for _, arg := range args {
		for s := range strings.SplitSeq(arg, ",") {
			left, right, _ := strings.Cut(s, "=")
			shard, err := strconv.ParseUint(left, 10, 31)
			if err != nil {
				return nil, usageErrorf("position %q: use SHARD=TIMESTAMP, two numbers", s)
			}
			timestamp, err := strconv.ParseUint(right, 10, 64)
			if err != nil {
				return nil, usageErrorf("position %q: use SHARD=TIMESTAMP, two numbers", s)
			}
			if seen[shard] {
				return nil, usageErrorf("shard %d is given twice", shard)
			}
			seen[shard] = true
			ps = append(ps, &snapshotdv1.ChannelPosition{
				Shard:    int32(shard),
				Position: &snapshotdv1.Position{Timestamp: timestamp},
			})
		}
	}
	return ps, nil
}

// parseStates parses state names, in any case; values maps enum names to values.
func parseStates[S ~int32](args []string, values map[string]int32) ([]S, error) {
	var states []S
	for _, arg := range args {
		v, ok := values["STATE_"+strings.ToUpper(arg)]
		if !ok || v == 0 {
			return nil, usageErrorf("%q is not a state; --help lists them", arg)
		}
		states = append(states, S(v))
	}
	return states, nil
}

// maxTTLDays is the longest time span that the API accepts: 100 years.
const (
	day        = 24 * time.Hour
	maxTTLDays = 36525
)

// parseSpan parses a duration or a number of days, such as 30d.
func parseSpan(s string) (d time.Duration, ok bool) {
	days, ok := strings.CutSuffix(s, "d")
	if !ok {
		d, err := time.ParseDuration(s)
		return d, err == nil
	}
	n, err := strconv.ParseUint(days, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, false
	}
	return time.Duration(min(n, maxTTLDays+1)) * day, true // a larger number would overflow
}

// span is a flag in the format of parseSpan.
type span struct {
	duration time.Duration
	text     string // as the user wrote it
}

// Set implements pflag.Value.
func (s *span) Set(text string) error {
	d, ok := parseSpan(text)
	if !ok {
		return errors.New("use a time span such as 36h or 30d")
	}
	s.duration, s.text = d, text
	return nil
}

// String implements pflag.Value.
func (s *span) String() string { return s.text }

// Type implements pflag.Value.
func (*span) Type() string { return "time span" }

// parseTTL parses --ttl.
func parseTTL(s string) (time.Duration, error) {
	d, ok := parseSpan(s)
	switch {
	case !ok || d <= 0:
		return 0, usageErrorf("--ttl %q: use a time span such as 36h or 30d", s)
	case d > maxTTLDays*day:
		return 0, usageErrorf("--ttl %q: at most 100 years, %dd", s, maxTTLDays)
	}
	return d, nil
}

func parseTime(s string) (*timestamppb.Timestamp, error) {
	t, err := time.Parse(time.RFC3339, s)
	ts := timestamppb.New(t)
	if err != nil || !ts.IsValid() { // before the year 1, after 9999
		return nil, usageErrorf("--expire-time %q: use a time such as 2030-01-31T00:00:00Z", s)
	}
	return ts, nil
}
