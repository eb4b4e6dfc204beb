package object

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Limits of the text of a joined error.
const (
	MaxJoined     = 8   // errors with their text
	maxJoinedText = 512 // bytes of each
)

// Join is [errors.Join] with a text of bounded length: that of the first errors, and the
// number of the others. errors.Is and errors.As find all of them.
func Join(errs ...error) error {
	j := &joined{}
	for _, err := range errs {
		if err != nil {
			j.errs = append(j.errs, err)
		}
	}
	if len(j.errs) == 0 {
		return nil
	}
	return j
}

type joined struct{ errs []error }

func (j *joined) Unwrap() []error { return j.errs }

func (j *joined) Error() string {
	var lines []string
	for _, err := range j.errs[:min(len(j.errs), MaxJoined)] {
		text := err.Error()
		if cut := maxJoinedText; len(text) > cut {
			for cut > 0 && !utf8.RuneStart(text[cut]) {
				cut--
			}
			text = text[:cut] + "..."
		}
		lines = append(lines, text)
	}
	if more := len(j.errs) - len(lines); more > 0 {
		lines = append(lines, fmt.Sprintf("and %d errors more", more))
	}
	return strings.Join(lines, "\n")
}
