// Package cli implements snapshotctl. Each command makes one call or a few through
// the public client and prints the response.
//
// A failed command returns its error; only Run prints errors and maps them to exit
// codes. Commands print through app.print or a list, which implement the three
// output formats. Text from outside goes through clean before it reaches a terminal.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

const (
	defaultAddr   = "127.0.0.1:7950"
	callTimeout   = 30 * time.Second
	createTimeout = 10 * time.Minute
)

// Program configures snapshotctl. The zero value is ready to use.
type Program struct {
	// Version is printed by `snapshotctl version`. Default: the version in the build
	// information of the Go toolchain.
	Version string
	// Getenv reads the environment. Default: os.Getenv.
	Getenv func(string) string
}

// Run runs snapshotctl with args (without the program name) and returns the exit
// code. Canceling ctx ends the command.
func Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return Program{}.Run(ctx, args, stdin, stdout, stderr)
}

// Run is like the function Run.
func (p Program) Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := p.app(stdin, stdout, stderr)
	defer a.close()
	root := a.root() //nolint:contextcheck // cobra passes ctx to the commands
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if !a.started { // a cobra error about flags or arguments
		err = asUsageError(cmd, err)
	}
	return a.report(ctx, err)
}

// app is one run of snapshotctl.
type app struct {
	in       io.Reader
	out, err io.Writer
	version  string
	getenv   func(string) string

	// Global flags.
	addr    string
	output  string
	timeout time.Duration // 0: the command's own default
	options client.Options

	started bool           // the command's own code runs: flags and arguments are valid
	conn    *client.Client // nil until the first call
	notes   []string       // server notes printed so far

	// The snapshot and collection as the user named them, for hints.
	snapshot, collection string
}

func (p Program) app(stdin io.Reader, stdout, stderr io.Writer) *app {
	a := &app{in: stdin, out: stdout, err: stderr, version: p.Version, getenv: p.Getenv}
	if a.version == "" {
		a.version = "unknown"
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
			a.version = info.Main.Version
		}
	}
	if a.getenv == nil {
		a.getenv = os.Getenv
	}
	return a
}

// The output formats.
const (
	formatTable = "table"
	formatJSON  = "json"
	formatYAML  = "yaml"
)

const rootLong = `snapshotctl takes, shows, restores and drops snapshots of collections and manages
their catalog through a snapshotd server.

Names:
  COLLECTION  NAME (in the database "default"), DB/NAME, or '#ID'
  SNAPSHOT    NAME or '#ID'; --id ID is the same as '#ID'. A name may consist of
              digits, so a bare number is a name. Quote '#ID': an unquoted #
              starts a shell comment.

Output (-o):
  table  for people; may change between releases
  json   the API's messages as protobuf JSON: lowerCamelCase names, 64-bit
         numbers as strings, bytes in base64, fields with zero values omitted.
         A list of several pages is one object. Stable, for programs
  yaml   the same as YAML

Exit codes:
  0  done
  1  any other error, including an interruption
  2  wrong usage, or an invalid request (INVALID_ARGUMENT)
  3  not found (NOT_FOUND)
  4  already exists (ALREADY_EXISTS)
  5  not possible in the current state (FAILED_PRECONDITION)
  6  no response from the server, or not in time (UNAVAILABLE, DEADLINE_EXCEEDED)
  7  aborted by a concurrent change; retry (ABORTED)
  8  a store is full, or a limit is reached (RESOURCE_EXHAUSTED)

Environment: SNAPSHOTCTL_ADDR, SNAPSHOTCTL_TLS_CA, SNAPSHOTCTL_TLS_CERT and
SNAPSHOTCTL_TLS_KEY set the flags of the same names.`

func (a *app) root() *cobra.Command {
	root := group("snapshotctl", "Operates snapshotd", rootLong)
	root.Example = `  snapshotctl info
  snapshotctl snapshot create nightly --collection docs
  snapshotctl snapshot list -o json`
	root.SilenceErrors, root.SilenceUsage = true, true
	root.Version = a.version // makes --version
	root.SetVersionTemplate(a.versionLine())
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return asUsageError(cmd, err) })

	f := root.PersistentFlags()
	f.StringVar(&a.addr, "addr", defaultAddr, "address of the server, `host:port`")
	f.StringVar(&a.options.CAFile, "tls-ca", "", "`file` with the certificate authorities to trust; turns TLS on")
	f.StringVar(&a.options.CertFile, "tls-cert", "", "`file` with the client's certificate; turns TLS on")
	f.StringVar(&a.options.KeyFile, "tls-key", "", "`file` with the client's key; turns TLS on")
	f.BoolVar(&a.options.TLS, "tls", false, "connect with TLS, trusting the system's certificate authorities")
	f.BoolVar(&a.options.Insecure, "insecure", false, "allow plaintext to other machines")
	f.StringVarP(&a.output, "output", "o", formatTable, "output `format`: table, json or yaml")
	f.DurationVar(&a.timeout, "timeout", 0, "timeout of each call (default 30s; snapshot create 10m; "+
		"none for add-segments, export, events -f, gc run and gc orphans)")
	formats := []string{formatTable, formatJSON, formatYAML}
	complete := cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)
	if err := root.RegisterFlagCompletionFunc("output", complete); err != nil {
		panic(err) // a programming error: the flag does not exist
	}
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if !slices.Contains(formats, a.output) {
			return asUsageError(cmd, fmt.Errorf("-o %s: the formats are %s", clean(a.output), strings.Join(formats, ", ")))
		}
		if a.timeout < 0 {
			return asUsageError(cmd, errors.New("--timeout must not be negative"))
		}
		for flag, to := range map[string]*string{
			"addr": &a.addr, "tls-ca": &a.options.CAFile, "tls-cert": &a.options.CertFile, "tls-key": &a.options.KeyFile,
		} {
			name := "SNAPSHOTCTL_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
			if v := a.getenv(name); v != "" && !cmd.Flags().Changed(flag) {
				*to = v
			}
		}
		return nil
	}
	root.AddCommand(
		a.snapshotCommand(), a.pinCommand(), a.restoreCommand(), a.explainCommand(), a.reclaimCommand(), a.gcCommand(),
		a.recoverCommand(), a.catalogCommand(), a.eventsCommand(), a.storeCommand(), a.debugCommand(), a.infoCommand(),
		a.versionCommand(),
	)
	return root
}

// group returns a command that only has subcommands.
func group(use, short, long string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: long,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			err := fmt.Errorf("unknown command %q", clean(args[0]))
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
			}
			return asUsageError(cmd, err)
		},
		RunE:                       func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SuggestionsMinimumDistance: 2,
	}
}

// run returns a RunE that calls f. Errors before f are usage errors.
func (a *app) run(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		a.started = true
		err := f(cmd.Context(), args)
		if u, ok := errors.AsType[*usageError](err); ok {
			u.command = cmd.CommandPath()
		}
		return err
	}
}

// exactArgs requires exactly these arguments, named as in the command's Use.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			err := fmt.Errorf("%s is missing", names[len(args)])
			if slices.Contains([]string{"SNAPSHOT", "COLLECTION"}, names[len(args)]) {
				err = fmt.Errorf("%w (quote an ID, as in '#42': an unquoted # starts a shell comment)", err)
			}
			return asUsageError(cmd, err)
		case len(args) > len(names):
			return asUsageError(cmd, fmt.Errorf("unexpected argument %q", clean(args[len(names)])))
		}
		return nil
	}
}

// connect returns the client. It connects on the first call.
func (a *app) connect() (*client.Client, error) {
	if a.conn == nil {
		o := a.options
		o.DialOptions = append(slices.Clone(o.DialOptions), grpc.WithChainUnaryInterceptor(a.printNotes))
		c, err := client.Dial(a.addr, o)
		if err != nil {
			return nil, &hintError{
				&usageError{err: err}, "--tls or --tls-ca connects with TLS; --insecure allows plaintext to other machines",
			}
		}
		a.conn = c
	}
	return a.conn, nil
}

// printNotes is an interceptor that prints each server note once.
func (a *app) printNotes(
	ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	var header metadata.MD
	err := invoke(ctx, method, req, reply, cc, append(opts, grpc.Header(&header))...)
	for _, text := range header.Get("snapshotd-note") {
		if !slices.Contains(a.notes, text) {
			a.notes = append(a.notes, text)
			fprintf(a.err, "note: %s\n", clean(text))
		}
	}
	return err
}

func (a *app) close() {
	if a.conn != nil {
		_ = a.conn.Close() // all responses have been read
	}
}

// withTimeout applies --timeout, or else the command's own default; 0 means no
// timeout.
func (a *app) withTimeout(ctx context.Context, fallback time.Duration) (context.Context, context.CancelFunc) {
	d := a.timeout
	if d == 0 {
		d = fallback
	}
	if d == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// unary makes one call with the default timeout, as in
// unary(ctx, a, c.Admin.GetServerInfo, req).
func unary[Req, Resp any](ctx context.Context, a *app, call callFunc[Req, Resp], req *Req) (*Resp, error) {
	ctx, cancel := a.withTimeout(ctx, callTimeout)
	defer cancel()
	return call(ctx, req)
}

// platform is the target of this build.
const platform = runtime.GOOS + "/" + runtime.GOARCH

func (a *app) versionLine() string {
	return fmt.Sprintf("snapshotctl %s (%s, %s)\n", a.version, runtime.Version(), platform)
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Prints the version of snapshotctl",
		Long:    "Prints the version of snapshotctl. `snapshotctl info` prints the server's.",
		Example: "  snapshotctl version",
		Args:    exactArgs(),
		RunE: a.run(func(context.Context, []string) error {
			v := map[string]string{"version": a.version, "goVersion": runtime.Version(), "platform": platform}
			return a.printValue(v, func(w io.Writer) { fprintf(w, "%s", a.versionLine()) })
		}),
	}
}

func (a *app) infoCommand() *cobra.Command {
	wait := false
	cmd := &cobra.Command{
		Use:     "info",
		Short:   "Shows the server: version, cluster, leader, stores",
		Example: "  snapshotctl info --addr snapshotd.example.com:7950 --tls\n  snapshotctl info --wait --timeout 1m",
		Args:    exactArgs(),
		RunE: a.run(func(ctx context.Context, _ []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			get := c.Admin.GetServerInfo
			if wait {
				get = readyInfo(c)
			}
			resp, err := unary(ctx, a, get, &snapshotdv1.GetServerInfoRequest{})
			if err != nil {
				return err
			}
			return a.print(resp, func(w io.Writer) {
				leader := resp.GetLeader()
				if leader == "" {
					leader = "none elected"
				}
				pairs := []any{
					"version", resp.GetVersion(),
					"cluster", resp.GetClusterId(),
					"replica", resp.GetReplica(),
					"leader", leader,
					"snapshot names", "unique per " + enumName(resp.GetNameScope(), "NAME_SCOPE_"),
					"stores", strings.Join(resp.GetStores(), ", "),
					"snapshot store", resp.GetSnapshotStore(),
				}
				// Optional: without a response the rest is still shown.
				if now, err := unary(ctx, a, c.Collector.GetCollectorStatus, &snapshotdv1.GetCollectorStatusRequest{}); err == nil {
					if now.GetBlocked() != "" {
						pairs = append(pairs, "blocked", "METADATA_BEHIND: "+now.GetBlocked())
					}
					if now.GetClockStopped() != "" {
						pairs = append(pairs, "clock", "CLOCK_UNTRUSTED: "+now.GetClockStopped())
					}
				}
				keyValues(w, "", pairs...)
			})
		}),
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait for the server to answer and a leader to be elected, up to --timeout")
	return cmd
}

// readyInfo returns a GetServerInfo that waits for the server and for a leader.
func readyInfo(c *client.Client) callFunc[snapshotdv1.GetServerInfoRequest, snapshotdv1.GetServerInfoResponse] {
	return func(
		ctx context.Context, req *snapshotdv1.GetServerInfoRequest, opts ...grpc.CallOption,
	) (*snapshotdv1.GetServerInfoResponse, error) {
		retry := time.NewTicker(50 * time.Millisecond)
		defer retry.Stop()
		var last error // of the last attempt
		for {
			resp, err := c.Admin.GetServerInfo(ctx, req, append(opts, grpc.WaitForReady(true))...)
			switch {
			case err == nil && resp.GetLeader() != "":
				return resp, nil
			case err == nil:
				last = status.Error(codes.DeadlineExceeded, "the server responds, but no leader is elected yet")
			case ctx.Err() != nil || status.Code(err) == codes.DeadlineExceeded:
				// The last attempt explains more than the timeout does.
				return nil, cmp.Or(last, err)
			case status.Code(err) != codes.Unavailable:
				return nil, err
			default:
				last = err
			}
			select {
			case <-ctx.Done():
				return nil, last
			case <-retry.C:
			}
		}
	}
}

func (a *app) storeCommand() *cobra.Command {
	cmd := group("store", "Checks object stores", "Checks the object stores of the server's configuration.")
	cmd.Example = "  snapshotctl store probe"
	cmd.AddCommand(&cobra.Command{
		Use:   "probe [ALIAS]",
		Short: "Checks the behaviour of an object store",
		Long: `Checks the behaviour that snapshotd relies on, with small objects under
snapshotd-probe/ that it removes afterwards. ALIAS defaults to the store for
snapshots. The exit code is 5 if a required check fails or could not be made.`,
		Example: `  snapshotctl store probe
  snapshotctl store probe archive -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			req := &snapshotdv1.ProbeStoreRequest{}
			if len(args) > 0 {
				req.Store = args[0]
			}
			resp, err := unary(ctx, a, c.Admin.ProbeStore, req)
			if err != nil {
				return err
			}
			if err := a.print(resp, func(w io.Writer) { renderProbe(w, resp) }); err != nil {
				return err
			}
			if !resp.GetUsable() {
				return status.Errorf(codes.FailedPrecondition,
					"store %s fails a required check, or the check could not be made", resp.GetStore())
			}
			return nil
		}),
	})
	return cmd
}

func renderProbe(w io.Writer, r *snapshotdv1.ProbeStoreResponse) {
	t := newTable(w, "", "CHECK", "REQUIRED", "HONOURED", "SEEN")
	for _, c := range r.GetChecks() {
		honoured := fmt.Sprint(c.GetOk())
		if c.GetNotKnown() {
			honoured = "not known"
		}
		t.row(c.GetName(), c.GetRequired(), honoured, c.GetDetail())
	}
	_ = t.flush() // w is memory
	if r.GetUsable() {
		fprintf(w, "store %s can be used\n", clean(r.GetStore()))
	}
}

func (a *app) debugCommand() *cobra.Command {
	cmd := group("debug", "Reads the metadata store", "Reads single records of the metadata store, for diagnosis.")
	cmd.Example = "  snapshotctl debug get /snapshot/rec/42"
	cmd.AddCommand(&cobra.Command{
		Use:   "get KEY",
		Short: "Shows one record of the metadata store",
		Long: `Shows one record of the metadata store in readable form, without changing it. KEY
omits the cluster's root; numbers need no leading zeros.`,
		Example: `  snapshotctl debug get /snapshot/rec/42
  snapshotctl debug get /gc/gen/7`,
		Args: exactArgs("KEY"),
		RunE: a.run(func(ctx context.Context, args []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			resp, err := unary(ctx, a, c.WholeKey, &snapshotdv1.GetKeyRequest{Key: args[0]})
			if err != nil {
				return err
			}
			return a.print(resp, func(w io.Writer) { renderKey(w, resp) })
		}),
	})
	return cmd
}
