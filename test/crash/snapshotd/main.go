//go:build unix

// Command snapshotd is the server with crash points: it kills itself where the
// environment says. See package crashpoint. It is built by `make crash`.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/snapshotd/snapshotd/embed"
	"github.com/snapshotd/snapshotd/test/crashpoint"
)

func main() {
	config := flag.String("config", "", "YAML file of settings")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := serve(ctx, *config)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "snapshotd:", err)
		os.Exit(1)
	}
}

// serve runs the server until ctx ends or the server fails.
func serve(ctx context.Context, config string) error {
	points, err := crashpoint.New(os.Getenv)
	if err != nil {
		return err
	}
	cfg, err := embed.LoadConfig(config, nil, nil)
	if err != nil {
		return err
	}
	cfg.Decorators = embed.Decorators{KV: points.KV, Store: points.Store, Transport: points.Transport}
	srv, err := embed.Start(ctx, cfg)
	if err != nil && ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })() // Wait returns its error
	return srv.Wait()
}
