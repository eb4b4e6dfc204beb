// Command demo shows snapshotd at work, start to end, on this machine: it starts
// a server, has the toy engine of examples/engine fill a collection, takes
// snapshots of it, deletes what no snapshot needs, drops the collection, reads it
// from a snapshot, and restores that, through a crash of the server. Run it by
// `make demo`, which builds what it needs.
//
// All it prints after a $ are commands that it runs, and what these print. It
// uses free ports of the loopback interface and a temporary folder, and leaves
// nothing behind; with KEEP=1 it leaves the server running and says how to stop
// it. The exit code is 1 if anything differs from what it should be.
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
	tell(ctx, d)
	if d.err != nil {
		d.complain(d.err.Error())
		d.showLog()
	}
	if d.err == nil && os.Getenv("KEEP") == "1" {
		d.keep()
	} else {
		d.end(context.WithoutCancel(ctx)) // also after an interrupt
	}
	fmt.Printf("\n%s\n", d.paint.dim(fmt.Sprintf("That took %s.", round(time.Since(began)))))
	if d.wrong > 0 {
		fmt.Println(d.paint.red(fmt.Sprintf("%d of %d checks failed.", d.wrong, d.checks)))
		return 1
	}
	fmt.Println(d.paint.green(fmt.Sprintf("All %d checks passed.", d.checks)))
	return 0
}
