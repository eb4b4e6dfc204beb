// Package cli is snapshotctl: commands that make one call, or a few, through the
// public client, and print the answer.
//
// A command that fails returns its error; Run alone prints errors and turns them
// into exit codes. Every command prints through app.print or a list, which know
// the three output formats, so that none has a format of its own. Whatever came
// from elsewhere goes through clean before it reaches a terminal.
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

// Program is snapshotctl as it is built and run. Its zero value is ready.
type Program struct {
	// Version is what `snapshotctl version` prints. Default: what the Go
	// toolchain recorded.
	Version string
	// Getenv reads the environment. Default: os.Getenv.
	Getenv func(string) string
}

// Run runs snapshotctl with its arguments, without the program's name, and
// returns the exit code. The command ends early when ctx does.
func Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return Program{}.Run(ctx, args, stdin, stdout, stderr)
}

// Run is as the function Run.
func (p Program) Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := p.app(stdin, stdout, stderr)
	defer a.close()
	root := a.root() //nolint:contextcheck // cobra hands ctx to the commands
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if !a.started { // cobra's, about flags and arguments
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

	started bool           // the command's own code runs: usage was right
	conn    *client.Client // once connected
	notes   []string       // of the server that were printed

	// What the user calls what the command is about, for hints.
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

const rootLong = `snapshotctl takes, shows and drops snapshots of collections, and looks after
their catalog, through a snapshotd server.

How things are named:
  COLLECTION  NAME (in the database "default"), DB/NAME, or '#ID'
  SNAPSHOT    NAME or '#ID'; --id ID says the latter, too. A name may consist
              of digits, so a bare number is a name. Quote '#ID': the shell
              takes an unquoted # for the beginning of a comment.

Output (-o):
  table  for people; it may change
  json   the API's messages as protobuf JSON: lowerCamelCase names, 64-bit
         numbers as strings, bytes in base64, fields with their zero value left
         out. A list of several pages is one object. Stable, for programs
  yaml   the same as YAML

Exit codes:
  0  done
  1  any other error, an interruption among them
  2  wrong usage, or a request that breaks a rule (INVALID_ARGUMENT)
  3  something does not exist (NOT_FOUND)
  4  something exists already (ALREADY_EXISTS)
  5  the state of things does not allow it (FAILED_PRECONDITION)
  6  no answer from the server, or not in time (UNAVAILABLE, DEADLINE_EXCEEDED)
  7  given up in favour of something concurrent; try again (ABORTED)
  8  a store is full, or a limit is reached (RESOURCE_EXHAUSTED)

Environment: SNAPSHOTCTL_ADDR, SNAPSHOTCTL_TLS_CA, SNAPSHOTCTL_TLS_CERT and
SNAPSHOTCTL_TLS_KEY stand in for the flags of these names.`

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
	f.StringVar(&a.addr, "addr", defaultAddr, "server to talk to, `host:port`")
	f.StringVar(&a.options.CAFile, "tls-ca", "", "`file` with the certificate authorities to trust; turns TLS on")
	f.StringVar(&a.options.CertFile, "tls-cert", "", "`file` with the client's certificate; turns TLS on")
	f.StringVar(&a.options.KeyFile, "tls-key", "", "`file` with the client's key; turns TLS on")
	f.BoolVar(&a.options.TLS, "tls", false, "connect with TLS, trusting the system's certificate authorities")
	f.BoolVar(&a.options.Insecure, "insecure", false, "allow plaintext to other machines")
	f.StringVarP(&a.output, "output", "o", formatTable, "output `format`: table, json or yaml")
	f.DurationVar(&a.timeout, "timeout", 0, "the longest that one call may take (default 30s; snapshot create 10m; add-segments, export, events -f, gc run and gc orphans any time)")
	formats := []string{formatTable, formatJSON, formatYAML}
	if err := root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // there is no such flag: a mistake in this function
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
	root.AddCommand(a.snapshotCommand(), a.pinCommand(), a.restoreCommand(), a.explainCommand(), a.reclaimCommand(), a.gcCommand(), a.recoverCommand(), a.catalogCommand(), a.eventsCommand(), a.storeCommand(), a.debugCommand(), a.infoCommand(), a.versionCommand())
	return root
}

// group returns a command that only holds others.
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

// run makes f a command's work. Errors from before f are about usage.
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

// args demands exactly these arguments, named as in the command's Use.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			err := fmt.Errorf("%s is missing", names[len(args)])
			if slices.Contains([]string{"SNAPSHOT", "COLLECTION"}, names[len(args)]) {
				err = fmt.Errorf("%w (an ID must be quoted, as in '#42': to the shell # begins a comment)", err)
			}
			return asUsageError(cmd, err)
		case len(args) > len(names):
			return asUsageError(cmd, fmt.Errorf("%q is one argument too many", clean(args[len(names)])))
		}
		return nil
	}
}

// connect returns the client, which the first call makes.
func (a *app) connect() (*client.Client, error) {
	if a.conn == nil {
		o := a.options
		o.DialOptions = append(slices.Clone(o.DialOptions), grpc.WithChainUnaryInterceptor(a.printNotes))
		c, err := client.Dial(a.addr, o)
		if err != nil {
			return nil, &hintError{&usageError{err: err}, "--tls or --tls-ca connects with TLS; --insecure allows plaintext to other machines"}
		}
		a.conn = c
	}
	return a.conn, nil
}

// printNotes prints the server's remarks on an answer, each once.
func (a *app) printNotes(
	ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
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
		_ = a.conn.Close() // the answers are in
	}
}

// limit bounds a call by --timeout, or by the command's own default; 0 is no
// bound.
func (a *app) withTimeout(ctx context.Context, byDefault time.Duration) (context.Context, context.CancelFunc) {
	d := a.timeout
	if d == 0 {
		d = byDefault
	}
	if d == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// unary makes one call with the usual bound. It is used as
// unary(ctx, a, c.Admin.GetServerInfo, req), less gRPC's options.
func unary[Req, Resp any](ctx context.Context, a *app, call callFunc[Req, Resp], req *Req) (*Resp, error) {
	ctx, cancel := a.withTimeout(ctx, callTimeout)
	defer cancel()
	return call(ctx, req)
}

// platform is what this program was built for.
const platform = runtime.GOOS + "/" + runtime.GOARCH

func (a *app) versionLine() string {
	return fmt.Sprintf("snapshotctl %s (%s, %s)\n", a.version, runtime.Version(), platform)
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Prints the version of snapshotctl",
		Long:    "Prints the version of snapshotctl. That of the server is in `snapshotctl info`.",
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
					leader = "none is elected"
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
				// Without an answer it is not known, and the rest is shown.
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

// readyInfo is GetServerInfo that waits for the server and for a leader.
func readyInfo(c *client.Client) callFunc[snapshotdv1.GetServerInfoRequest, snapshotdv1.GetServerInfoResponse] {
	return func(ctx context.Context, req *snapshotdv1.GetServerInfoRequest, opts ...grpc.CallOption) (*snapshotdv1.GetServerInfoResponse, error) {
		retry := time.NewTicker(50 * time.Millisecond)
		defer retry.Stop()
		var last error // of the last answer
		for {
			resp, err := c.Admin.GetServerInfo(ctx, req, append(opts, grpc.WaitForReady(true))...)
			switch {
			case err == nil && resp.GetLeader() != "":
				return resp, nil
			case err == nil:
				last = status.Error(codes.DeadlineExceeded, "the server answers, and no leader is elected yet")
			case ctx.Err() != nil || status.Code(err) == codes.DeadlineExceeded:
				// The answer there was says more than the end of the time.
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
	cmd := group("store", "Looks at object stores", "Looks at the object stores that the server is configured with.")
	cmd.Example = "  snapshotctl store probe"
	cmd.AddCommand(&cobra.Command{
		Use:   "probe [ALIAS]",
		Short: "Finds out what an object store honours",
		Long: `Finds out what an object store honours of what snapshotd relies on, by small
objects under snapshotd-probe/ that it removes again. Without ALIAS it is the
store for snapshots. The exit code is 5 when the store lacks what is required, or
when a required check could not be made.`,
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
				return status.Errorf(codes.FailedPrecondition, "store %s lacks what snapshotd needs, or a check could not be made", resp.GetStore())
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
		t.row(clean(c.GetName()), c.GetRequired(), honoured, clean(c.GetDetail()))
	}
	_ = t.flush() // w is memory
	if r.GetUsable() {
		fprintf(w, "store %s can be used\n", clean(r.GetStore()))
	}
}

func (a *app) debugCommand() *cobra.Command {
	cmd := group("debug", "Looks behind the API", "Looks behind the API, to find out what happened.")
	cmd.Example = "  snapshotctl debug get /snapshot/rec/42"
	cmd.AddCommand(&cobra.Command{
		Use:   "get KEY",
		Short: "Shows one record of the metadata store",
		Long: `Shows one record of the metadata store in readable form. It never changes
anything. KEY is without the cluster's root; numbers need no leading zeros.`,
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
