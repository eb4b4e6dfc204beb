package embed

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
)

// Config holds all settings under their names in the YAML file. Start from [Default];
// the zero value of a field means its default. The table of settings (settings.go)
// has all defaults and bounds; "snapshotd config print" and "snapshotd serve --help"
// print them.
type Config struct {
	// DataDir is the directory of all data without a place of its own.
	DataDir string `json:"data_dir"`
	// Listen is the address of the gRPC service, as host:port; port 0 selects a free
	// one. Anything but a loopback address requires TLS.
	Listen string `json:"listen"`
	// MetricsListen is the HTTP address of /metrics, /healthz and, on a loopback
	// address, /debug/pprof/; "off" disables it.
	MetricsListen string `json:"metrics_listen"`
	// MetricsPublic allows MetricsListen to be another than a loopback address. All
	// hosts that reach it can read the metrics.
	MetricsPublic bool `json:"metrics_public"`

	// EtcdEndpoints are the addresses of etcd. Default: none, which runs etcd in
	// this process, under DataDir/etcd.
	EtcdEndpoints []string `json:"etcd_endpoints"`
	// EtcdRoot is the prefix of every key, at most 64 bytes; one for each cluster.
	EtcdRoot string `json:"etcd_root"`
	// EtcdTLS secures the connection to EtcdEndpoints. Default: no TLS.
	EtcdTLS EtcdTLS `json:"etcd_tls"`
	// EtcdUsername is the user at etcd. Default: none.
	EtcdUsername string `json:"etcd_username"`
	// EtcdPasswordFile is the file that holds the user's password.
	EtcdPasswordFile string `json:"etcd_password_file"`
	// EtcdQuotaBytes is the size at which the etcd in this process refuses new data.
	// Drops and deletes continue.
	EtcdQuotaBytes int64 `json:"etcd_quota_bytes"`

	// EtcdCompact makes snapshotd compact the etcd at EtcdEndpoints, for all its
	// users, to the revisions of the last hour. Prefer etcd's own
	// --auto-compaction-mode.
	EtcdCompact bool `json:"etcd_compact"`

	// ObjectStores are the object stores by alias. Default: one, "default", of
	// type file under DataDir/objects.
	ObjectStores map[string]ObjectStore `json:"object_stores"`
	// SnapshotStore is the alias of the store for the snapshots' own files.
	SnapshotStore string `json:"snapshot_store"`
	// NameScope is the scope in which snapshot names are unique: "cluster" or
	// "collection". The first start of a cluster fixes it.
	NameScope string `json:"name_scope"`

	// TLS secures Listen. Default: plaintext, on a loopback address only.
	TLS TLS `json:"tls"`
	// MaxConnections bounds the open connections; one other host gets at most half as
	// many. A connection beyond the bound waits for up to 3 seconds and is then
	// refused. A connection counts once its client has sent the first bytes of HTTP/2,
	// for which it has 3 seconds.
	MaxConnections int `json:"max_connections"`
	// AllowReserveIDs allows AllocateIds to reserve a range of ids that an engine
	// chooses, and to release one. A range that is reserved by mistake takes its
	// ids from the whole cluster.
	AllowReserveIDs bool `json:"allow_reserve_ids"`

	// CreateTimeout is the time limit of a create.
	CreateTimeout Duration `json:"create_timeout"`
	// CreateLeaseTTL is the time without progress after which a create is abandoned.
	CreateLeaseTTL Duration `json:"create_lease_ttl"`
	// LeaderTTL is how long a leader may be silent before it is replaced, and a worker
	// of restores before its tasks go to another.
	LeaderTTL Duration `json:"leader_ttl"`
	// MaxCreates is the number of concurrent creates of a replica; others wait or
	// are refused.
	MaxCreates int `json:"max_creates"`
	// RestoreSlots is the number of concurrent restore tasks of a replica; a task has
	// up to 32 segments.
	RestoreSlots int `json:"restore_slots"`
	// CopyInFlight is the number of concurrent object copies of a replica, over all
	// restores. It drops by itself while a store does not keep up.
	CopyInFlight int `json:"copy_in_flight"`
	// KeepRestores is the time for which ended restore jobs are kept.
	KeepRestores Duration `json:"keep_restores"`
	// RestoreStallTimeout is the time that a restore waits for a store that does not
	// answer while no file is finished; then it fails.
	RestoreStallTimeout Duration `json:"restore_stall_timeout"`
	// RestoreRefusalTimeout is the time for which a restore retries copies that the
	// store refuses for an expired token, a right, a clock or the like.
	RestoreRefusalTimeout Duration `json:"restore_refusal_timeout"`

	// ClockMaxDowntime is the time without any server after which the clock counts as
	// stepped. Then nothing expires until `snapshotctl recover --clock`.
	ClockMaxDowntime Duration `json:"clock_max_downtime"`

	// Collector controls whether the leader deletes unneeded data by itself: "on" or
	// "off". With "off" it makes no rounds and no sweeps, and still removes dropped
	// and expired snapshots. YAML reads an unquoted on as true, which means the same.
	Collector string `json:"collector"`
	// CollectTolerance is the minimum time between a drop and the deletion by the
	// collector.
	CollectTolerance Duration `json:"collect_tolerance"`
	// CollectInterval is the time between two cycles of the collector.
	CollectInterval Duration `json:"collect_interval"`
	// CollectMaxShare is the fraction of a collection of 100 units or more at which a
	// cycle stops instead of deleting more of it, above 0; 1 never stops one.
	CollectMaxShare float64 `json:"collect_max_share"`
	// CollectRate is the objects per second that the collector deletes, in bursts of
	// up to 1000; negative: no limit.
	CollectRate int `json:"collect_rate"`
	// OrphanGrace is the minimum age, by its store's clock, at which the collector
	// deletes an object without a record under snapshotd's own prefixes.
	OrphanGrace Duration `json:"orphan_grace"`
	// GoneIDRanges is the number of ranges of gone ids in each 4096 ids above which
	// the gaps between them are closed.
	GoneIDRanges int `json:"gone_id_ranges"`
	// GoneIDAge is the minimum age of the last of those ids before that.
	GoneIDAge Duration `json:"gone_id_age"`
	// SweepInterval is the time between two sweeps for objects without a record, each
	// of which lists snapshotd's own prefixes.
	SweepInterval Duration `json:"sweep_interval"`

	// Grace is the time that a stop waits for running calls.
	Grace Duration `json:"grace"`

	// LogLevel is "debug", "info", "warn" or "error".
	LogLevel string `json:"log_level"`
	// LogFormat is "json" or "console".
	LogFormat string `json:"log_format"`
	// Replica is the unique name of this process. Default: made of the host's name,
	// the process id and random letters.
	Replica string `json:"replica"`

	// Decorators wrap the stores of the server. Default: none.
	Decorators Decorators `json:"-"`
	// Log replaces the log on standard error with LogLevel and LogFormat.
	Log *zap.Logger `json:"-"`
	// Version is the version that the server reports. Default: "unknown".
	Version string `json:"-"`
}

// TLS holds the files that secure the gRPC service: TLS 1.3, with a required client
// certificate. All three or none are set.
type TLS struct {
	// Cert is a PEM file of the server's certificate chain.
	Cert string `json:"cert"`
	// Key is a PEM file of the certificate's key.
	Key string `json:"key"`
	// ClientCA is a PEM file of the authorities that sign client certificates.
	ClientCA string `json:"client_ca"`
}

// EtcdTLS holds the files that secure the connection to etcd.
type EtcdTLS struct {
	// CA is a PEM file of the authorities that sign etcd's certificates.
	CA string `json:"ca"`
	// Cert is a PEM file of the client's certificate; needs Key and CA.
	Cert string `json:"cert"`
	// Key is a PEM file of the certificate's key.
	Key string `json:"key"`
}

// Default returns the configuration of an embedded server: one process that
// keeps everything below one directory and listens on the loopback address.
func Default() Config {
	c := Config{Version: "unknown"}
	c.setDefaults()
	return c
}

func (c *Config) setDefaults() {
	for _, s := range c.settings() {
		s.setDefault()
	}
}

// complete returns c with the defaults in place of zero values.
func (c Config) complete() Config {
	c.setDefaults()
	orElse(&c.Version, "unknown")
	switch c.Collector { // YAML reads an unquoted on or off as a boolean
	case "true":
		c.Collector = collectorOn
	case "false":
		c.Collector = collectorOff
	}
	if c.EtcdEndpoints == nil {
		c.EtcdEndpoints = []string{}
	}
	stores := map[string]ObjectStore{}
	for alias, s := range c.ObjectStores {
		orElse(&s.Type, typeFile)
		stores[alias] = s
	}
	if len(stores) == 0 {
		stores["default"] = ObjectStore{Type: typeFile, Path: filepath.Join(c.DataDir, "objects")}
	}
	c.ObjectStores = stores
	return c
}

// Flags adds a flag for each setting to fs. Setting a flag changes c.
func (c *Config) Flags(fs *pflag.FlagSet) {
	for _, s := range c.settings() {
		s.addFlag(fs)
	}
}

// report collects an error of a field.
type report func(field, format string, args ...any)

// Validate returns all errors together, each with the name of the field. It reads
// the files that the configuration names.
func (c Config) Validate() error {
	c = c.complete()
	var errs []error
	invalid := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf(field+": "+format, args...))
	}
	if _, err := c.serverTLS(zap.NewNop()); err != nil {
		invalid("tls", "%w", err)
	}
	c.validateEtcd(invalid)
	c.validateStores(invalid)
	for _, s := range c.settings() {
		if err := s.validate(); err != nil {
			invalid(s.name, "%w", err)
		}
	}
	return errors.Join(errs...)
}

func (c *Config) checkListen() error {
	switch loopback, err := isLoopback(c.Listen); {
	case err != nil:
		return err
	case !loopback && c.TLS == (TLS{}):
		return fmt.Errorf("%s can be reached from other hosts: set tls.cert, tls.key and tls.client_ca, "+
			"or listen on 127.0.0.1", c.Listen)
	}
	return nil
}

func (c *Config) checkMetricsListen() error {
	if c.MetricsListen == "off" {
		return nil
	}
	switch loopback, err := isLoopback(c.MetricsListen); {
	case err != nil:
		return err
	case !loopback && !c.MetricsPublic:
		return fmt.Errorf("%s can be reached from other hosts: set metrics_public to allow that, "+
			"or listen on 127.0.0.1", c.MetricsListen)
	}
	return nil
}

func (c *Config) checkEtcdRoot() error {
	if !strings.HasPrefix(c.EtcdRoot, "/") || strings.HasSuffix(c.EtcdRoot, "/") || len(c.EtcdRoot) > 64 {
		return fmt.Errorf("%q does not begin with a slash, or ends in one, or is longer than 64 bytes", c.EtcdRoot)
	}
	return nil
}

// checkMaxShare checks CollectMaxShare; NaN fails.
func (c *Config) checkMaxShare() error {
	if c.CollectMaxShare > 0 && c.CollectMaxShare <= 1 {
		return nil
	}
	return fmt.Errorf("%v is not above 0 and at most 1", c.CollectMaxShare)
}

func (c *Config) checkReplica() error {
	if c.Replica == "" {
		return nil
	}
	err := catalog.CheckName("replica", c.Replica)
	if invalid, ok := errors.AsType[*catalog.InvalidError](err); ok {
		return errors.New(invalid.Problem)
	}
	return err
}

func (c *Config) validateEtcd(invalid report) {
	for i, e := range c.EtcdEndpoints {
		switch {
		case e == "":
			invalid(fmt.Sprintf("etcd_endpoints[%d]", i), "is empty")
		case strings.Contains(e, "@"):
			invalid(fmt.Sprintf("etcd_endpoints[%d]", i),
				"must not hold a user or password: use etcd_username and etcd_password_file")
		}
	}
	if len(c.EtcdEndpoints) == 0 {
		if c.EtcdTLS != (EtcdTLS{}) || c.EtcdUsername != "" || c.EtcdPasswordFile != "" {
			invalid("etcd_endpoints", "etcd_tls, etcd_username and etcd_password_file are of no use without endpoints")
		}
		return
	}
	if _, err := c.etcdTLS(zap.NewNop()); err != nil {
		invalid("etcd_tls", "%w", err)
	}
	if _, err := c.etcdPassword(); err != nil {
		invalid("etcd_password_file", "%w", err)
	}
}

// aliases returns the aliases of the object stores, sorted.
func (c Config) aliases() []string {
	return slices.Sorted(maps.Keys(c.ObjectStores))
}

// nameScope returns the NameScope of a valid configuration.
func (c Config) nameScope() cluster.NameScope {
	if c.NameScope == cluster.ScopeCollection.String() {
		return cluster.ScopeCollection
	}
	return cluster.ScopeCluster
}

// isLoopback reports whether an address to listen on can be reached from this host
// alone.
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
