// Command etcd runs an etcd for a benchmark, in the directory that is its only
// argument. It prints its endpoint, and ends with SIGTERM.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/snapshotd/snapshotd/internal/store/meta/etcdserver"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if len(os.Args) != 2 {
		return errors.New("usage: etcd directory")
	}
	srv, err := etcdserver.Start(ctx, etcdserver.Config{Dir: os.Args[1], ClientAddr: "127.0.0.1:0"})
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, srv.Endpoint())
	select {
	case <-ctx.Done():
	case err = <-srv.Err():
	}
	return errors.Join(err, srv.Close())
}
