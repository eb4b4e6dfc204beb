// Command snapshotd is the server.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/snapshotd/snapshotd/embed"
)

// version is set by the linker.
var version = "unknown"

// The exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal starts a graceful stop; a second one ends the process.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run runs the program until it ends or ctx ends, and returns the exit code.
func run(ctx context.Context, args []string, env func(string) (string, bool), stdout, stderr io.Writer) int {
	a := &app{env: env}
	root := a.root() //nolint:contextcheck // cobra passes it on
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	// One line, also for joined errors.
	fmt.Fprintf(stderr, "snapshotd: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	if !a.began { // the arguments are wrong
		fmt.Fprintln(stderr, "Run 'snapshotd --help' for usage.")
		return exitUsage
	}
	return exitError
}

type app struct {
	env   func(string) (string, bool)
	began bool // the arguments were accepted
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "snapshotd",
		Short: "Snapshots of collections of immutable segment files.",
		Long: `snapshotd takes snapshots of collections of immutable segment files, without
copying a byte of them, and keeps every file that a snapshot needs.

Each flag is also a setting of the YAML file (--config; "snapshotd config print"
prints the names) and an environment variable: SNAPSHOTD_DATA_DIR is that of
--data-dir. Flags win over the environment, which wins over the file.

Exit codes: 0 a graceful end, 1 an error, 2 wrong usage.`,
		Version:       version, // makes --version
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { a.began = true; return cmd.Help() },
	}
	root.SetVersionTemplate("snapshotd {{.Version}}\n")
	root.CompletionOptions.DisableDefaultCmd = true
	config := &cobra.Command{
		Use: "config", Short: "Shows the configuration.", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return errors.New("config needs a subcommand: config print") },
	}
	config.AddCommand(a.print())
	root.AddCommand(a.serve(), config, &cobra.Command{
		Use: "version", Short: "Prints the version.", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a.began = true
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "snapshotd %s\n", version)
			return err
		},
	})
	return root
}

// flags adds the flags of the configuration to cmd, and returns the function that loads
// the configuration after they are parsed.
func (a *app) flags(cmd *cobra.Command) func() (embed.Config, error) {
	scratch := embed.Default()
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	fs.SortFlags = false
	scratch.Flags(fs)
	cmd.Flags().SortFlags = false
	path := cmd.Flags().String("config", "", "YAML file of settings")
	cmd.Flags().AddFlagSet(fs)
	return func() (embed.Config, error) {
		if *path == "" {
			*path, _ = a.env(embed.EnvName("config"))
		}
		return embed.LoadConfig(*path, a.env, cmd.Flags())
	}
}

func (a *app) serve() *cobra.Command {
	cmd := &cobra.Command{Use: "serve", Short: "Runs the server until a signal ends it.", Args: cobra.NoArgs}
	load := a.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		a.began = true
		cfg, err := load()
		if err != nil {
			return errors.Join(err, cfg.Validate())
		}
		cfg.Version = version
		srv, err := embed.Start(cmd.Context(), cfg)
		if err != nil && cmd.Context().Err() != nil {
			return nil //nolint:nilerr // a signal ended the start
		}
		if err != nil {
			return err
		}
		ended := make(chan error, 1)
		go func() { ended <- srv.Wait() }()
		select {
		case err := <-ended:
			return err
		case <-cmd.Context().Done():
			return srv.Close()
		}
	}
	return cmd
}

func (a *app) print() *cobra.Command {
	cmd := &cobra.Command{
		Use: "print", Short: "Prints the configuration that serve would run with.", Args: cobra.NoArgs,
		Long: `Prints the configuration that serve would run with, as a file for --config.
It has no secrets, only the names of the files that hold them.`,
	}
	load := a.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		a.began = true
		cfg, err := load()
		if err != nil {
			return err
		}
		data, err := cfg.YAML()
		if err != nil {
			return err
		}
		if _, err := cmd.OutOrStdout().Write(data); err != nil {
			return err
		}
		return cfg.Validate()
	}
	return cmd
}
