//go:build unix && !linux

package file

import (
	"errors"
	"os"
)

// clone always fails: shared blocks are supported on Linux only.
func clone(_, _ *os.File) error { return errors.ErrUnsupported }
