package embed

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	yamlv3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
)

// Config is all that can be set. The names are those of the YAML file. Make one
// with [Default]; the zero value of a field that has a default means the
// default.
type Config struct {
	// DataDir is the directory that holds everything that is not told to go
	// elsewhere. Default: "snapshotd-data".
	DataDir string `json:"data_dir"`
	// Listen is the address of the gRPC service, as host:port; port 0 takes any.
	// Anything but a loopback address needs TLS. Default: "127.0.0.1:7950".
	Listen string `json:"listen"`
	// MetricsListen is the HTTP address of /metrics, /healthz and, on a loopback
	// address, /debug/pprof/; "off" for none. Default: "127.0.0.1:7951".
	MetricsListen string `json:"metrics_listen"`
	// MetricsPublic allows MetricsListen to be another than a loopback address.
	// Whoever reaches it can read the metrics. Default: false.
	MetricsPublic bool `json:"metrics_public"`

	// EtcdEndpoints are the addresses of etcd. Default: none, which runs etcd in
	// this process, under DataDir/etcd.
	EtcdEndpoints []string `json:"etcd_endpoints"`
	// EtcdRoot is in front of every key; one for each cluster. At most 64 bytes.
	// Default: "/snapshotd".
	EtcdRoot string `json:"etcd_root"`
	// EtcdTLS secures the connection to EtcdEndpoints. Default: no TLS.
	EtcdTLS EtcdTLS `json:"etcd_tls"`
	// EtcdUsername is the user at etcd. Default: none.
	EtcdUsername string `json:"etcd_username"`
	// EtcdPasswordFile is the file that holds the user's password.
	EtcdPasswordFile string `json:"etcd_password_file"`
	// EtcdQuotaBytes is the size at which the etcd in this process takes nothing new;
	// drops and deletes go on. Default: 8589934592 (8 GiB).
	EtcdQuotaBytes int64 `json:"etcd_quota_bytes"`

	// EtcdCompact has snapshotd compact the etcd at EtcdEndpoints, for all who use
	// it: what is older than an hour goes. Default: false, for etcd's own
	// --auto-compaction-mode does it better.
	EtcdCompact bool `json:"etcd_compact"`

	// ObjectStores are the object stores by alias. Default: one, "default", of
	// type file under DataDir/objects.
	ObjectStores map[string]ObjectStore `json:"object_stores"`
	// SnapshotStore is the alias of the store that snapshots' own files go to.
	// Default: "default".
	SnapshotStore string `json:"snapshot_store"`
	// NameScope is within what snapshot names are unique: "cluster" or
	// "collection". It is settled at the cluster's first start. Default:
	// "cluster".
	NameScope string `json:"name_scope"`

	// TLS secures Listen. Default: plaintext, on a loopback address only.
	TLS TLS `json:"tls"`
	// MaxConnections is how many connections there may be at once, and from one
	// other host half as many. One more is refused; of the total, after 3 seconds.
	// A connection counts from when its client has sent the first bytes of HTTP/2,
	// for which it has 3 seconds. Default: 1024.
	MaxConnections int `json:"max_connections"`
	// AllowReserveIDs allows AllocateIds to reserve a range of ids that an engine
	// chooses, and to release one. A range that is reserved by mistake takes its
	// ids from the whole cluster. Default: false.
	AllowReserveIDs bool `json:"allow_reserve_ids"`

	// CreateTimeout bounds a create as a whole. Default: 10m.
	CreateTimeout Duration `json:"create_timeout"`
	// CreateLeaseTTL is after how long a create that does not advance is given
	// up. Default: 1m.
	CreateLeaseTTL Duration `json:"create_lease_ttl"`
	// LeaderTTL is after how long without a sign of life a leader is replaced, and
	// the tasks of a replica that works on restores go to another.
	// Default: 10s.
	LeaderTTL Duration `json:"leader_ttl"`
	// MaxCreates is how many creates a replica works on at once; others wait or
	// are turned away. Default: 64.
	MaxCreates int `json:"max_creates"`
	// RestoreSlots is how many tasks of restores a replica works on at once; a
	// task has up to 32 segments. Default: 8.
	RestoreSlots int `json:"restore_slots"`
	// CopyInFlight is how many objects a replica copies at once, over all
	// restores. It is lowered by itself while a store does not keep up. Default:
	// 32.
	CopyInFlight int `json:"copy_in_flight"`
	// KeepRestores is how long restore jobs are kept after their end. Default:
	// 168h, which is a week.
	KeepRestores Duration `json:"keep_restores"`
	// RestoreStallTimeout is how long a restore waits for a store that does not
	// answer while none of its files is finished, before it is given up. Default: 24h.
	RestoreStallTimeout Duration `json:"restore_stall_timeout"`
	// RestoreRefusalTimeout is how long a restore tries copies again that the store
	// refuses for an expired token, a right, a clock or the like. Default: 5m.
	RestoreRefusalTimeout Duration `json:"restore_refusal_timeout"`

	// ClockMaxDowntime is for how long no server may have run before the time that
	// has passed is taken for a clock that stepped: then nothing expires until
	// `snapshotctl recover --clock`. Default: 840h, which is 35 days.
	ClockMaxDowntime Duration `json:"clock_max_downtime"`

	// Collector says whether the leader deletes by itself what nothing needs any
	// more: "on" or "off". With "off" it makes no rounds and no sweeps; snapshots
	// that were dropped or expired it still removes. YAML takes an unquoted on for
	// true, which means the same here. Default: "on".
	Collector string `json:"collector"`
	// CollectTolerance is how long ago a thing must have been dropped before the
	// collector takes it. Default: 3h.
	CollectTolerance Duration `json:"collect_tolerance"`
	// CollectInterval is between two rounds of the collector. Default: 1m.
	CollectInterval Duration `json:"collect_interval"`
	// CollectMaxShare is the share of a collection at which a round stops instead
	// of deleting more of it, if it is 100 units or more: above 0 and at most 1,
	// which never stops one. Default: 0.5.
	CollectMaxShare float64 `json:"collect_max_share"`
	// CollectRate is how many objects the collector deletes in a second, up to 1000
	// of them at once; negative for as many as the store takes. Default: 3000.
	CollectRate int `json:"collect_rate"`
	// OrphanGrace is how old an object under snapshotd's own prefixes must be
	// that nothing knows, by its store's clock, before the collector deletes it.
	// At least 1h. Default: 24h.
	OrphanGrace Duration `json:"orphan_grace"`
	// GoneIDRanges is how many ranges the ids whose records are gone may make of each
	// 4096 ids before the gaps between them are closed. Default: 256.
	GoneIDRanges int `json:"gone_id_ranges"`
	// GoneIDAge is how long ago the last of those ids must have gone for that.
	// Default: 720h.
	GoneIDAge Duration `json:"gone_id_age"`
	// SweepInterval is between two looks for such objects, each of which lists
	// these prefixes. Default: 1h.
	SweepInterval Duration `json:"sweep_interval"`

	// Grace is how long the end waits for calls under way. Default: 15s.
	Grace Duration `json:"grace"`

	// LogLevel is "debug", "info", "warn" or "error". Default: "info".
	LogLevel string `json:"log_level"`
	// LogFormat is "json" or "console". Default: "json".
	LogFormat string `json:"log_format"`
	// Replica is the name of this process, different from all others'. Default:
	// made of the host's name, the process id and chance.
	Replica string `json:"replica"`

	// Decorators wrap the stores of the server. Default: none.
	Decorators Decorators `json:"-"`
	// Log takes the place of a log on standard error of LogLevel and LogFormat.
	Log *zap.Logger `json:"-"`
	// Version is that of the program, for people. Default: "unknown".
	Version string `json:"-"`
}

// TLS says how the gRPC service is secured: TLS 1.3, with a client certificate
// required. All three files or none.
type TLS struct {
	// Cert is a PEM file of the server's certificate and what leads to its root.
	Cert string `json:"cert"`
	// Key is a PEM file of the certificate's key.
	Key string `json:"key"`
	// ClientCA is a PEM file of who may sign client certificates.
	ClientCA string `json:"client_ca"`
}

// EtcdTLS says how the connection to etcd is secured.
type EtcdTLS struct {
	// CA is a PEM file of who may sign etcd's certificates.
	CA string `json:"ca"`
	// Cert is a PEM file of the client's certificate; needs Key and CA.
	Cert string `json:"cert"`
	// Key is a PEM file of the certificate's key.
	Key string `json:"key"`
}

// Duration is a duration that is written as 1m30s, or as a number of days, 7d.
// Where one is written it is not zero, which would mean the default.
type Duration time.Duration

// String returns d as time.Duration writes it.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := parseSpan(string(text))
	switch {
	case err != nil:
		return fmt.Errorf("%q is not a time span such as 1m30s or 7d", text)
	case parsed == 0:
		return &zeroError{string(text)}
	}
	*d = Duration(parsed)
	return nil
}

// parseSpan reads a time span, which may also be a number of days.
func parseSpan(text string) (time.Duration, error) {
	days, ok := strings.CutSuffix(text, "d")
	if !ok {
		return time.ParseDuration(text)
	}
	const day = 24 * time.Hour
	n, err := strconv.ParseUint(days, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, err
	}
	return time.Duration(min(n, uint64(2*longest/day))) * day, nil // more would overflow
}

// longest is the longest time span of all settings.
const longest = 10 * 365 * 24 * time.Hour

// zeroError says that a time span is zero.
type zeroError struct{ text string }

func (e *zeroError) Error() string { return strconv.Quote(e.text) + " is too short" }

// tooShort returns err, and of a time span that is zero an error that says how long
// the one of the setting must be.
func tooShort(setting string, err error) error {
	zero, ok := errors.AsType[*zeroError](err)
	if !ok {
		return err
	}
	for _, s := range (&Config{}).spans() {
		if s.setting == setting {
			return fmt.Errorf("%q must be at least %s", zero.text, s.least)
		}
	}
	return err
}

// span is a setting that is a time span, with its bounds as people write them.
type span struct {
	setting     string
	value       *Duration
	least, most string
}

func (c *Config) spans() []span {
	return []span{
		{"create_timeout", &c.CreateTimeout, "1s", "24h"},
		{"create_lease_ttl", &c.CreateLeaseTTL, "2s", "24h"},
		{"leader_ttl", &c.LeaderTTL, "2s", "24h"},
		{"collect_interval", &c.CollectInterval, "1s", "24h"},
		{"grace", &c.Grace, "1ms", "24h"},
		{"keep_restores", &c.KeepRestores, "1m", "ten years"},
		{"restore_stall_timeout", &c.RestoreStallTimeout, "1m", "ten years"},
		{"restore_refusal_timeout", &c.RestoreRefusalTimeout, "1s", "24h"},
		{"clock_max_downtime", &c.ClockMaxDowntime, "1h", "ten years"},
		{"collect_tolerance", &c.CollectTolerance, "1ms", "ten years"},
		{"orphan_grace", &c.OrphanGrace, "1h", "ten years"},
		{"gone_id_age", &c.GoneIDAge, "1h", "ten years"},
		{"sweep_interval", &c.SweepInterval, "1s", "ten years"},
	}
}

// within says whether a time span is within its bounds.
func (s span) within() bool {
	least, leastErr := time.ParseDuration(s.least)
	most, mostErr := time.ParseDuration(s.most)
	if mostErr != nil {
		most = longest
	}
	v := time.Duration(*s.value)
	return leastErr == nil && v >= least && v <= most
}

// spanFlag is a flag of a time span, whose errors say how long it must be.
type spanFlag struct {
	*Duration
	setting string
}

// Set implements pflag.Value.
func (f spanFlag) Set(text string) error { return tooShort(f.setting, f.Duration.Set(text)) }

// Set implements pflag.Value.
func (d *Duration) Set(text string) error { return d.UnmarshalText([]byte(text)) }

// Type implements pflag.Value.
func (*Duration) Type() string { return "duration" }

// Default returns the configuration of an embedded server: one process that
// keeps everything below one directory and listens on the loopback address.
func Default() Config {
	return Config{
		DataDir:             "snapshotd-data",
		Listen:              "127.0.0.1:7950",
		MetricsListen:       "127.0.0.1:7951",
		EtcdRoot:            "/snapshotd",
		EtcdQuotaBytes:      8 << 30,
		SnapshotStore:       "default",
		NameScope:           cluster.ScopeCluster.String(),
		MaxConnections:      1024,
		CreateTimeout:       Duration(10 * time.Minute),
		CreateLeaseTTL:      Duration(time.Minute),
		LeaderTTL:           Duration(10 * time.Second),
		MaxCreates:          64,
		RestoreSlots:        8,
		CopyInFlight:        32,
		KeepRestores:        Duration(7 * 24 * time.Hour),
		RestoreStallTimeout: Duration(24 * time.Hour),
		ClockMaxDowntime:    Duration(clock.DefaultMaxDowntime),
		Collector:           collectorOn,
		CollectTolerance:    Duration(3 * time.Hour),
		CollectInterval:     Duration(time.Minute),
		CollectMaxShare:     0.5,
		CollectRate:         3000,
		OrphanGrace:         Duration(24 * time.Hour),
		GoneIDRanges:        catalog.DefaultMaxGoneRanges,
		GoneIDAge:           Duration(catalog.DefaultGoneGapAge),
		SweepInterval:       Duration(time.Hour),
		Grace:               Duration(15 * time.Second),
		LogLevel:            "info",
		LogFormat:           "json",
		Version:             "unknown",

		RestoreRefusalTimeout: Duration(5 * time.Minute),
	}
}

// What Config.Collector may be.
const (
	collectorOn  = "on"
	collectorOff = "off"
)

// complete returns c with the defaults in place of zero values.
func (c Config) complete() Config {
	d := Default()
	orElse(&c.DataDir, d.DataDir)
	orElse(&c.Listen, d.Listen)
	orElse(&c.MetricsListen, d.MetricsListen)
	orElse(&c.EtcdRoot, d.EtcdRoot)
	orElse(&c.EtcdQuotaBytes, d.EtcdQuotaBytes)
	orElse(&c.SnapshotStore, d.SnapshotStore)
	orElse(&c.NameScope, d.NameScope)
	orElse(&c.MaxConnections, d.MaxConnections)
	orElse(&c.CreateTimeout, d.CreateTimeout)
	orElse(&c.CreateLeaseTTL, d.CreateLeaseTTL)
	orElse(&c.LeaderTTL, d.LeaderTTL)
	orElse(&c.MaxCreates, d.MaxCreates)
	orElse(&c.RestoreSlots, d.RestoreSlots)
	orElse(&c.CopyInFlight, d.CopyInFlight)
	orElse(&c.KeepRestores, d.KeepRestores)
	orElse(&c.RestoreStallTimeout, d.RestoreStallTimeout)
	orElse(&c.RestoreRefusalTimeout, d.RestoreRefusalTimeout)
	orElse(&c.ClockMaxDowntime, d.ClockMaxDowntime)
	orElse(&c.Collector, d.Collector)
	switch c.Collector { // as YAML reads them without quotes
	case "true":
		c.Collector = collectorOn
	case "false":
		c.Collector = collectorOff
	}
	orElse(&c.CollectTolerance, d.CollectTolerance)
	orElse(&c.CollectInterval, d.CollectInterval)
	orElse(&c.CollectMaxShare, d.CollectMaxShare)
	orElse(&c.CollectRate, d.CollectRate)
	orElse(&c.OrphanGrace, d.OrphanGrace)
	orElse(&c.GoneIDRanges, d.GoneIDRanges)
	orElse(&c.GoneIDAge, d.GoneIDAge)
	orElse(&c.SweepInterval, d.SweepInterval)
	orElse(&c.Grace, d.Grace)
	orElse(&c.LogLevel, d.LogLevel)
	orElse(&c.LogFormat, d.LogFormat)
	orElse(&c.Version, d.Version)
	if c.EtcdEndpoints == nil {
		c.EtcdEndpoints = []string{}
	}
	stores := map[string]ObjectStore{}
	for alias, s := range c.ObjectStores {
		orElse(&s.Type, "file")
		stores[alias] = s
	}
	if len(stores) == 0 {
		stores["default"] = ObjectStore{Type: "file", Path: filepath.Join(c.DataDir, "objects")}
	}
	c.ObjectStores = stores
	return c
}

func orElse[T comparable](field *T, fallback T) {
	var zero T
	if *field == zero {
		*field = fallback
	}
}

// Flags adds a flag for each field to fs. Setting one changes c.
func (c *Config) Flags(fs *pflag.FlagSet) {
	fs.StringVar(&c.DataDir, "data-dir", c.DataDir, "directory of everything that is not told to go elsewhere")
	fs.StringVar(&c.Listen, "listen", c.Listen, "address of the gRPC service; not on this host alone needs TLS")
	fs.StringVar(&c.MetricsListen, "metrics-listen", c.MetricsListen, "HTTP address of metrics, health and profiles, or off")
	fs.BoolVar(&c.MetricsPublic, "metrics-public", c.MetricsPublic, "allow --metrics-listen to be reached from other hosts")
	fs.StringSliceVar(&c.EtcdEndpoints, "etcd-endpoints", c.EtcdEndpoints, "addresses of etcd (default: etcd in this process, under the data directory)")
	fs.StringVar(&c.EtcdRoot, "etcd-root", c.EtcdRoot, "in front of every key in etcd; one for each cluster")
	fs.StringVar(&c.EtcdTLS.CA, "etcd-ca", c.EtcdTLS.CA, "PEM file of who may sign etcd's certificates")
	fs.StringVar(&c.EtcdTLS.Cert, "etcd-cert", c.EtcdTLS.Cert, "PEM file of the client certificate for etcd")
	fs.StringVar(&c.EtcdTLS.Key, "etcd-key", c.EtcdTLS.Key, "PEM file of its key")
	fs.StringVar(&c.EtcdUsername, "etcd-username", c.EtcdUsername, "user at etcd")
	fs.StringVar(&c.EtcdPasswordFile, "etcd-password-file", c.EtcdPasswordFile, "file with the user's password")
	fs.Int64Var(&c.EtcdQuotaBytes, "etcd-quota-bytes", c.EtcdQuotaBytes, "size at which the etcd in this process takes nothing new")
	fs.BoolVar(&c.EtcdCompact, "etcd-compact", c.EtcdCompact, "compact the etcd at --etcd-endpoints, for all who use it: what is older than an hour goes")
	fs.Var(&storesFlag{config: c}, "object-store", "object store as alias=directory or alias=s3://bucket/prefix?endpoint=..., may be repeated; without an alias it is the default (default: default=<data-dir>/objects)")
	fs.StringVar(&c.SnapshotStore, "snapshot-store", c.SnapshotStore, "alias of the store for the snapshots' own files")
	fs.StringVar(&c.NameScope, "name-scope", c.NameScope, "within what snapshot names are unique: cluster or collection; settled at the first start")
	fs.StringVar(&c.TLS.Cert, "tls-cert", c.TLS.Cert, "PEM file of the server's certificate")
	fs.StringVar(&c.TLS.Key, "tls-key", c.TLS.Key, "PEM file of its key")
	fs.StringVar(&c.TLS.ClientCA, "tls-client-ca", c.TLS.ClientCA, "PEM file of who may sign client certificates")
	fs.IntVar(&c.MaxConnections, "max-connections", c.MaxConnections, "connections at once; from one other host half as many")
	fs.BoolVar(&c.AllowReserveIDs, "allow-reserve-ids", c.AllowReserveIDs, "allow AllocateIds to reserve and release ranges of ids that an engine chooses")
	fs.Var(spanFlag{&c.CreateTimeout, "create_timeout"}, "create-timeout", "bound on a create as a whole")
	fs.Var(spanFlag{&c.CreateLeaseTTL, "create_lease_ttl"}, "create-lease-ttl", "after how long a create that does not advance is given up")
	fs.Var(spanFlag{&c.LeaderTTL, "leader_ttl"}, "leader-ttl", "after how long without a sign of life a leader, or one who works on restores, is replaced")
	fs.IntVar(&c.MaxCreates, "max-creates", c.MaxCreates, "creates that a replica works on at once")
	fs.IntVar(&c.RestoreSlots, "restore-slots", c.RestoreSlots, "tasks of restores that a replica works on at once")
	fs.IntVar(&c.CopyInFlight, "copy-in-flight", c.CopyInFlight, "objects that a replica copies at once")
	fs.Var(spanFlag{&c.KeepRestores, "keep_restores"}, "keep-restores", "how long restore jobs are kept after their end")
	fs.Var(spanFlag{&c.RestoreStallTimeout, "restore_stall_timeout"}, "restore-stall-timeout",
		"how long a restore waits for a store that does not answer while none of its files is finished")
	fs.Var(spanFlag{&c.RestoreRefusalTimeout, "restore_refusal_timeout"}, "restore-refusal-timeout",
		"how long a restore tries again what the store refuses for an expired token, a right or a clock")
	fs.Var(spanFlag{&c.ClockMaxDowntime, "clock_max_downtime"}, "clock-max-downtime", "how long no server may have run before the clock counts as one that stepped")
	fs.StringVar(&c.Collector, "collector", c.Collector, "whether the leader deletes by itself what nothing needs any more: on or off, with which it still removes snapshots that were dropped or expired")
	fs.Var(spanFlag{&c.CollectTolerance, "collect_tolerance"}, "collect-tolerance", "how long ago a thing must have been dropped before the collector takes it")
	fs.Var(spanFlag{&c.CollectInterval, "collect_interval"}, "collect-interval", "between two rounds of the collector")
	fs.Float64Var(&c.CollectMaxShare, "collect-max-share", c.CollectMaxShare, "share of a collection at which a round of 100 units or more stops instead of deleting more of it, above 0 and at most 1")
	fs.IntVar(&c.CollectRate, "collect-rate", c.CollectRate, "objects that the collector deletes in a second, up to 1000 of them at once; negative: as many as the store takes")
	fs.Var(spanFlag{&c.OrphanGrace, "orphan_grace"}, "orphan-grace", "how old an object that nothing knows must be before the collector deletes it, at least 1h")
	fs.IntVar(&c.GoneIDRanges, "gone-id-ranges", c.GoneIDRanges, "ranges of each 4096 ids whose records are gone before the gaps between them are closed, 1 to 2048")
	fs.Var(spanFlag{&c.GoneIDAge, "gone_id_age"}, "gone-id-age", "how long ago the last of those ids must have gone for that, at least 1h")
	fs.Var(spanFlag{&c.SweepInterval, "sweep_interval"}, "sweep-interval", "between two looks for such objects")
	fs.Var(spanFlag{&c.Grace, "grace"}, "grace", "how long the end waits for calls under way")
	fs.StringVar(&c.LogLevel, "log-level", c.LogLevel, "debug, info, warn or error")
	fs.StringVar(&c.LogFormat, "log-format", c.LogFormat, "json or console")
	fs.StringVar(&c.Replica, "replica", c.Replica, "name of this process (default: made of host, process id and chance)")
}

// EnvPrefix begins the names of the environment variables. What follows is the
// name of the flag in capitals, with _ for -.
const EnvPrefix = "SNAPSHOTD_"

// EnvName is the variable of a flag.
func EnvName(flag string) string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// LoadConfig returns the configuration that results from the defaults, then the
// YAML file at path unless it is empty, then the environment, in which an empty
// variable counts as none, then those flags that were changed. The flags are
// ones that [Config.Flags] added, to any Config, and may be nil, as env may.
// The error names every mistake there is in form; see [Config.Validate] for
// mistakes in substance.
func LoadConfig(path string, env func(name string) (string, bool), flags *pflag.FlagSet) (Config, error) {
	c := Default()
	var errs []error
	if path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return c, fmt.Errorf("read configuration: %w", err)
		}
		if err := yaml.UnmarshalStrict(data, &c); err != nil {
			errs = append(errs, fmt.Errorf("configuration %s: %w", path, nameFields(data, err)))
		}
		for _, err := range c.unset() {
			errs = append(errs, fmt.Errorf("configuration %s: %w", path, err))
			c.Collector, c.CollectMaxShare = Default().Collector, Default().CollectMaxShare // it is told once
		}
	}
	if env != nil {
		own := pflag.NewFlagSet("", pflag.ContinueOnError)
		c.Flags(own)
		own.VisitAll(func(f *pflag.Flag) {
			if text, ok := env(EnvName(f.Name)); ok && text != "" {
				if err := f.Value.Set(text); err != nil {
					errs = append(errs, fmt.Errorf("environment variable %s: %w", EnvName(f.Name), expected(f.Value.Type(), text, err)))
				}
			}
		})
	}
	if flags != nil {
		own := pflag.NewFlagSet("", pflag.ContinueOnError)
		c.Flags(own)
		flags.Visit(func(f *pflag.Flag) {
			target := own.Lookup(f.Name)
			if target == nil {
				return
			}
			set := func() error { return target.Value.Set(f.Value.String()) }
			if list, ok := f.Value.(pflag.SliceValue); ok { // as text, what is in it might fall apart
				set = func() error { return target.Value.(pflag.SliceValue).Replace(list.GetSlice()) }
			}
			if err := set(); err != nil {
				errs = append(errs, fmt.Errorf("flag --%s: %w", f.Name, err))
			}
		})
	}
	errs = append(errs, c.unset()...)
	return c.complete(), errors.Join(errs...)
}

// expected says what the value of a flag should look like. It has the place of
// the error err for types whose own errors speak of Go.
func expected(flagType, text string, err error) error {
	switch flagType {
	case "int", "int64":
		if errors.Is(err, strconv.ErrRange) {
			return fmt.Errorf("%q is out of range", text)
		}
		return fmt.Errorf("%q is not a whole number", text)
	case "float64":
		return fmt.Errorf("%q is not a number", text)
	case "bool":
		return fmt.Errorf("%q is not true or false", text)
	}
	return err
}

// nameFields returns, for a file that was refused with err, an error that names
// each wrong field and what is expected there. The decoder stops at the first
// and seldom says which it is, so each field is tried alone.
func nameFields(data []byte, err error) error {
	var fields map[string]any
	var errs []error
	if yaml.Unmarshal(data, &fields) != nil {
		_ = yamlv3.Unmarshal(data, &fields) // else it is not even YAML
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			if v, ok := fields[name].(float64); ok && (math.IsNaN(v) || math.IsInf(v, 0)) {
				errs = append(errs, fmt.Errorf("%s: %v is not a finite number", name, v))
			}
		}
		if len(errs) == 0 {
			return err
		}
		return errors.Join(errs...)
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		part, partErr := yaml.Marshal(map[string]any{name: fields[name]})
		if partErr == nil {
			partErr = yaml.UnmarshalStrict(part, new(Config))
		}
		if partErr != nil {
			errs = append(errs, fieldError(name, partErr))
		}
	}
	if len(errs) == 0 { // such as a name that is there twice
		return err
	}
	return errors.Join(errs...)
}

// unknownField is how encoding/json says it; it has no type for that.
var unknownField = regexp.MustCompile(`json: unknown field ("[^"]*")`)

// fieldError is about the mistake that is somewhere in the field name.
func fieldError(name string, err error) error {
	if m := unknownField.FindStringSubmatch(err.Error()); m != nil {
		if m[1] == strconv.Quote(name) {
			return fmt.Errorf("there is no setting %s", m[1])
		}
		return fmt.Errorf("%s: there is no setting %s", name, m[1])
	}
	if _, ok := errors.AsType[*zeroError](err); ok {
		return fmt.Errorf("%s: %w", name, tooShort(name, err))
	}
	if t, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		if t.Field != "" {
			name = t.Field
		}
		return fmt.Errorf("%s: %s is expected, not %s", name, kindOf(t.Type), t.Value)
	}
	// What is within says it all; around it is how it was read.
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return fmt.Errorf("%s: %w", name, err)
}

// kindOf says what a field of type t takes.
func kindOf(t reflect.Type) string {
	if t == reflect.TypeFor[Duration]() {
		return "a time span such as 1m30s or 7d"
	}
	switch t.Kind() {
	case reflect.Int, reflect.Int64:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "names with values"
	default:
		return "text"
	}
}

// YAML returns the configuration as a file that [LoadConfig] reads. It holds no
// secrets: these are in files, of which it has the names.
func (c Config) YAML() ([]byte, error) {
	// By way of JSON in the order of the fields; a map would sort them.
	data, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()                        // a float64 does not hold every whole number
	if _, err := d.Token(); err != nil { // the brace
		return nil, err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		var value any
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		part, err := yaml.Marshal(map[string]any{fmt.Sprint(name): value})
		if err != nil {
			return nil, err
		}
		out.Write(part)
	}
	return out.Bytes(), nil
}

// checkShare checks CollectMaxShare.
func (c Config) checkShare() error {
	if c.CollectMaxShare > 0 && c.CollectMaxShare <= 1 { // unlike NaN
		return nil
	}
	return fmt.Errorf("collect_max_share: %v is not above 0 and at most 1", c.CollectMaxShare)
}

// unset names the mistakes that the defaults would hide: what was set to the zero
// value that stands for the default in a Config.
func (c Config) unset() (errs []error) {
	if c.Collector == "" {
		errs = append(errs, errors.New(`collector: "" is not on or off`))
	}
	if err := c.checkShare(); c.CollectMaxShare == 0 || math.IsNaN(c.CollectMaxShare) { // NaN cannot be printed
		errs = append(errs, err)
	}
	return errs
}

// Validate returns all mistakes at once, each with the name of the field, and
// reads the files that the configuration names to see that they are usable.
func (c Config) Validate() error {
	c = c.complete()
	var errs []error
	wrong := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf(field+": "+format, args...))
	}

	_, tlsErr := c.serverTLS(zap.NewNop())
	if tlsErr != nil {
		wrong("tls", "%w", tlsErr)
	}
	switch loopback, err := isLoopback(c.Listen); {
	case err != nil:
		wrong("listen", "%w", err)
	case !loopback && c.TLS == (TLS{}):
		wrong("listen", "%s can be reached from other hosts: set tls.cert, tls.key and tls.client_ca, or listen on 127.0.0.1", c.Listen)
	}
	if c.MetricsListen != "off" {
		switch loopback, err := isLoopback(c.MetricsListen); {
		case err != nil:
			wrong("metrics_listen", "%w", err)
		case !loopback && !c.MetricsPublic:
			wrong("metrics_listen", "%s can be reached from other hosts: set metrics_public to allow that, or listen on 127.0.0.1", c.MetricsListen)
		}
	}

	c.validateEtcd(wrong)
	c.validateStores(wrong)

	for _, s := range c.spans() {
		if !s.within() {
			wrong(s.setting, "%v is not %s to %s", *s.value, s.least, s.most)
		}
	}
	if c.GoneIDRanges < 1 || c.GoneIDRanges > 2048 {
		wrong("gone_id_ranges", "%d is not 1 to 2048", c.GoneIDRanges)
	}
	if c.MaxCreates < 1 || c.MaxCreates > 1024 {
		wrong("max_creates", "%d is not 1 to 1024", c.MaxCreates)
	}
	if c.RestoreSlots < 1 || c.RestoreSlots > 256 {
		wrong("restore_slots", "%d is not 1 to 256", c.RestoreSlots)
	}
	if c.CopyInFlight < 1 || c.CopyInFlight > 1024 {
		wrong("copy_in_flight", "%d is not 1 to 1024", c.CopyInFlight)
	}
	if c.Collector != collectorOn && c.Collector != collectorOff {
		wrong("collector", "%q is not on or off", c.Collector)
	}
	if err := c.checkShare(); err != nil {
		errs = append(errs, err)
	}
	if c.MaxConnections < 1 {
		wrong("max_connections", "%d is not positive", c.MaxConnections)
	}
	if _, err := zapcore.ParseLevel(c.LogLevel); err != nil || !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		wrong("log_level", "%q is not debug, info, warn or error", c.LogLevel)
	}
	if c.LogFormat != "json" && c.LogFormat != "console" {
		wrong("log_format", "%q is not json or console", c.LogFormat)
	}
	if _, err := c.nameScope(); err != nil {
		wrong("name_scope", "%w", err)
	}
	if c.Replica != "" {
		if err := catalog.CheckName("replica", c.Replica); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (c Config) validateEtcd(wrong func(field, format string, args ...any)) {
	if !strings.HasPrefix(c.EtcdRoot, "/") || strings.HasSuffix(c.EtcdRoot, "/") || len(c.EtcdRoot) > 64 {
		wrong("etcd_root", "%q does not begin with a slash, or ends in one, or is longer than 64 bytes", c.EtcdRoot)
	}
	if c.EtcdQuotaBytes < 16<<20 {
		wrong("etcd_quota_bytes", "%d is less than 16 MiB", c.EtcdQuotaBytes)
	}
	for i, e := range c.EtcdEndpoints {
		switch {
		case e == "":
			wrong(fmt.Sprintf("etcd_endpoints[%d]", i), "is empty")
		case strings.Contains(e, "@"):
			wrong(fmt.Sprintf("etcd_endpoints[%d]", i), "must not hold a user or password: use etcd_username and etcd_password_file")
		}
	}
	if len(c.EtcdEndpoints) == 0 {
		if c.EtcdTLS != (EtcdTLS{}) || c.EtcdUsername != "" || c.EtcdPasswordFile != "" {
			wrong("etcd_endpoints", "etcd_tls, etcd_username and etcd_password_file are of no use without endpoints")
		}
		return
	}
	if _, err := c.etcdTLS(zap.NewNop()); err != nil {
		wrong("etcd_tls", "%w", err)
	}
	if _, err := c.etcdPassword(); err != nil {
		wrong("etcd_password_file", "%w", err)
	}
}

// aliases are those of the object stores, in order.
func (c Config) aliases() []string {
	list := make([]string, 0, len(c.ObjectStores))
	for alias := range c.ObjectStores {
		list = append(list, alias)
	}
	slices.Sort(list)
	return list
}

func (c Config) nameScope() (cluster.NameScope, error) {
	for _, s := range []cluster.NameScope{cluster.ScopeCluster, cluster.ScopeCollection} {
		if c.NameScope == s.String() {
			return s, nil
		}
	}
	return 0, fmt.Errorf("%q is not cluster or collection", c.NameScope)
}

// isLoopback says whether an address to listen on is for this host alone.
func isLoopback(addr string) (bool, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return false, fmt.Errorf("%q is not host:port", addr)
	}
	if _, err := net.LookupPort("tcp", port); err != nil { //nolint:noctx // numbers and a local file
		return false, fmt.Errorf("%q has no valid port", addr)
	}
	if host == "localhost" {
		return true, nil
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback(), nil
}
