//go:build race

package virtual

import "runtime"

func init() { runtime.GOMAXPROCS(1) }
