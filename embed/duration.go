package embed

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Duration is a duration that is written as 1m30s, or as a number of days, 7d. The
// text of a zero duration is refused: the zero value of a setting means the default.
type Duration time.Duration

// Units of the settings.
const (
	millisecond = Duration(time.Millisecond)
	second      = Duration(time.Second)
	minute      = Duration(time.Minute)
	hour        = Duration(time.Hour)
	day         = 24 * hour

	// longest is the longest duration of all settings.
	longest = 10 * 365 * day
)

// String returns d in the format of time.Duration.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := parseDuration(string(text))
	switch {
	case err != nil:
		return fmt.Errorf("%q is not a time span such as 1m30s or 7d", text)
	case parsed == 0:
		return &zeroError{string(text)}
	}
	*d = parsed
	return nil
}

// Set implements pflag.Value.
func (d *Duration) Set(text string) error { return d.UnmarshalText([]byte(text)) }

// Type implements pflag.Value.
func (*Duration) Type() string { return "duration" }

// parseDuration parses a Go duration or a number of days.
func parseDuration(text string) (Duration, error) {
	days, ok := strings.CutSuffix(text, "d")
	if !ok {
		d, err := time.ParseDuration(text)
		return Duration(d), err
	}
	n, err := strconv.ParseUint(days, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, err
	}
	return Duration(min(n, uint64(2*longest/day))) * day, nil // more would overflow
}

// short returns d without its zero units: 24h, not 24h0m0s.
func (d Duration) short() string {
	if d == longest {
		return "ten years"
	}
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// zeroError reports the text of a zero duration.
type zeroError struct{ text string }

func (e *zeroError) Error() string { return strconv.Quote(e.text) + " is too short" }
