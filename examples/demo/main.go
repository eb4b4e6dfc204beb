// Command demo demonstrates snapshotd from start to end on this machine: it starts a
// server, fills a collection with the toy engine of examples/engine, takes snapshots
// of it, deletes the files that no snapshot holds, drops the collection, reads it from
// a snapshot, and restores the snapshot across a crash of the server. Run it with
// `make demo`, which builds the programs.
//
// Lines after a $ are commands, followed by their output. The demo uses free ports of
// the loopback interface and a temporary folder, and removes everything; with KEEP=1
// it leaves the server running and prints how to stop it. The exit code is 1 if a
// check fails.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal is not caught
	os.Exit(run(ctx))
}

// run returns the exit code.
func run(ctx context.Context) int {
	began := time.Now()
	d := &demo{paint: colours()}
	if err := d.prepare(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		d.clean()
		return 1
	}
	story(ctx, d)
	if d.err != nil {
		d.complain(d.err.Error())
		d.showLog()
	}
	if d.err == nil && os.Getenv("KEEP") == "1" {
		d.keep()
	} else {
		d.end(context.WithoutCancel(ctx)) // also after an interrupt
	}
	fmt.Printf("\n%s\n", d.paint.dim(fmt.Sprintf("Total time: %s.", round(time.Since(began)))))
	if d.failed > 0 {
		fmt.Println(d.paint.red(fmt.Sprintf("%d of %d checks failed.", d.failed, d.checks)))
		return 1
	}
	fmt.Println(d.paint.green(fmt.Sprintf("All %d checks passed.", d.checks)))
	return 0
}
