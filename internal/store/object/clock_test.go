package object_test

import (
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

func TestEarlierClock(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for name, c := range map[string]struct {
		store time.Time
		want  time.Time // zero: an error
	}{
		"equal":              {at, at},
		"store behind":       {at.Add(-time.Minute), at.Add(-time.Minute)},
		"store ahead":        {at.Add(time.Minute), at},
		"just so far behind": {at.Add(-5 * time.Minute), at.Add(-5 * time.Minute)},
		"just so far ahead":  {at.Add(5 * time.Minute), at},
		"too far behind":     {at.Add(-5*time.Minute - 1), time.Time{}},
		"too far ahead":      {at.Add(5*time.Minute + 1), time.Time{}},
		"no time at all":     {time.Time{}, time.Time{}}, // further than a Duration tells
	} {
		t.Run(name, func(t *testing.T) {
			got, err := object.EarlierClock("cold", at, c.store)
			if !got.Equal(c.want) || (err != nil) != c.want.IsZero() {
				t.Errorf("%v, %v; want %v", got, err, c.want)
			}
			if err != nil && (!strings.Contains(err.Error(), "store cold") || !strings.Contains(err.Error(), "2026-01-02T03:04:05Z")) {
				t.Errorf("it does not say whose clocks they are: %v", err)
			}
		})
	}
}
