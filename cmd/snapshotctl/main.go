// Command snapshotctl is the operator's tool for snapshotd.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/snapshotd/snapshotd/internal/cli"
)

// version is set by the linker.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal ends the command; a second one ends the process.
	context.AfterFunc(ctx, stop)
	os.Exit(cli.Program{Version: version}.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
