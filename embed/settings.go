package embed

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
)

// setting is a row of the table of settings. Default, the flags, the environment
// variables and Validate follow from the table; a test compares the documents with it.
type setting struct {
	name     string // in a file; tls.cert is the field cert of tls
	flag     string // default: the name with dashes
	value    any    // pointer to the field of the Config
	fallback any    // default, of the field's type; nil: the zero value
	min, max any    // inclusive bounds, of the field's type; nil: none
	unit     string // of min and max in errors
	oneOf    []string
	check    func() error // further rule of the value
	// strict makes the zero value an error in a file, in the environment and in a
	// flag. Elsewhere the zero value means the default.
	strict bool
	help   string // of the flag
}

// Values of Config.Collector.
const (
	collectorOn  = "on"
	collectorOff = "off"
)

// settings returns the table of settings in the order of the flags.
func (c *Config) settings() []setting {
	return slices.Concat(c.addressSettings(), c.etcdSettings(), c.storeSettings(), c.accessSettings(),
		c.createSettings(), c.restoreSettings(), c.collectorSettings(), c.processSettings())
}

func (c *Config) addressSettings() []setting {
	return []setting{
		{
			name: "data_dir", value: &c.DataDir, fallback: "snapshotd-data",
			help: "directory of all data without a place of its own",
		},
		{
			name: "listen", value: &c.Listen, fallback: "127.0.0.1:7950", check: c.checkListen,
			help: "address of the gRPC service; requires TLS unless it is a loopback address",
		},
		{
			name: "metrics_listen", value: &c.MetricsListen, fallback: "127.0.0.1:7951", check: c.checkMetricsListen,
			help: "HTTP address of metrics, health and profiles, or off",
		},
		{
			name: "metrics_public", value: &c.MetricsPublic,
			help: "allow --metrics-listen to be reached from other hosts",
		},
	}
}

func (c *Config) etcdSettings() []setting {
	return []setting{
		{
			name: "etcd_endpoints", value: &c.EtcdEndpoints,
			help: "addresses of etcd (default: etcd in this process, under the data directory)",
		},
		{
			name: "etcd_root", value: &c.EtcdRoot, fallback: "/snapshotd", check: c.checkEtcdRoot,
			help: "prefix of every key in etcd; one for each cluster",
		},
		{
			name: "etcd_tls.ca", flag: "etcd-ca", value: &c.EtcdTLS.CA,
			help: "PEM file of the authorities that sign etcd's certificates",
		},
		{
			name: "etcd_tls.cert", flag: "etcd-cert", value: &c.EtcdTLS.Cert,
			help: "PEM file of the client certificate for etcd",
		},
		{name: "etcd_tls.key", flag: "etcd-key", value: &c.EtcdTLS.Key, help: "PEM file of its key"},
		{name: "etcd_username", value: &c.EtcdUsername, help: "user at etcd"},
		{name: "etcd_password_file", value: &c.EtcdPasswordFile, help: "file with the user's password"},
		{
			name: "etcd_quota_bytes", value: &c.EtcdQuotaBytes, fallback: int64(8 << 30), min: int64(16 << 20),
			unit: " bytes", help: "size at which the etcd in this process refuses new data",
		},
		{
			name: "etcd_compact", value: &c.EtcdCompact,
			help: "compact the history of the etcd at --etcd-endpoints, for all its users, to one hour",
		},
	}
}

func (c *Config) storeSettings() []setting {
	return []setting{
		{
			name: "object_stores", flag: "object-store", value: &c.ObjectStores,
			help: "object store as alias=directory or alias=s3://bucket/prefix?endpoint=..., may be repeated; " +
				"without an alias it is the default (default: default=<data-dir>/objects)",
		},
		{
			name: "snapshot_store", value: &c.SnapshotStore, fallback: "default",
			help: "alias of the store for the snapshots' own files",
		},
		{
			name: "name_scope", value: &c.NameScope, fallback: cluster.ScopeCluster.String(),
			oneOf: []string{cluster.ScopeCluster.String(), cluster.ScopeCollection.String()},
			help:  "scope in which snapshot names are unique: cluster or collection; fixed at the first start",
		},
	}
}

func (c *Config) accessSettings() []setting {
	return []setting{
		{name: "tls.cert", value: &c.TLS.Cert, help: "PEM file of the server's certificate"},
		{name: "tls.key", value: &c.TLS.Key, help: "PEM file of its key"},
		{name: "tls.client_ca", value: &c.TLS.ClientCA, help: "PEM file of the authorities that sign client certificates"},
		{
			name: "max_connections", value: &c.MaxConnections, fallback: 1024, min: 1,
			help: "open connections; one other host gets at most half as many",
		},
		{
			name: "allow_reserve_ids", value: &c.AllowReserveIDs,
			help: "allow AllocateIds to reserve and release ranges of ids that an engine chooses",
		},
	}
}

func (c *Config) createSettings() []setting {
	return []setting{
		{
			name: "create_timeout", value: &c.CreateTimeout, fallback: 10 * minute, min: second, max: day,
			help: "time limit of a create",
		},
		{
			name: "create_lease_ttl", value: &c.CreateLeaseTTL, fallback: minute, min: 2 * second, max: day,
			help: "time without progress after which a create is abandoned",
		},
		{
			name: "leader_ttl", value: &c.LeaderTTL, fallback: 10 * second, min: 2 * second, max: day,
			help: "silence after which a leader, or a worker of restores, is replaced",
		},
		{
			name: "max_creates", value: &c.MaxCreates, fallback: 64, min: 1, max: 1024,
			help: "concurrent creates of a replica",
		},
	}
}

func (c *Config) restoreSettings() []setting {
	return []setting{
		{
			name: "restore_slots", value: &c.RestoreSlots, fallback: 8, min: 1, max: 256,
			help: "concurrent restore tasks of a replica",
		},
		{
			name: "copy_in_flight", value: &c.CopyInFlight, fallback: 32, min: 1, max: 1024,
			help: "concurrent object copies of a replica",
		},
		{
			name: "keep_restores", value: &c.KeepRestores, fallback: 7 * day, min: minute, max: longest,
			help: "time for which ended restore jobs are kept",
		},
		{
			name: "restore_stall_timeout", value: &c.RestoreStallTimeout, fallback: day, min: minute, max: longest,
			help: "time that a restore waits for a store that does not answer while no file is finished",
		},
		{
			name: "restore_refusal_timeout", value: &c.RestoreRefusalTimeout, fallback: 5 * minute, min: second, max: day,
			help: "time for which a restore retries copies that the store refuses for an expired token, a right or a clock",
		},
		{
			name: "clock_max_downtime", value: &c.ClockMaxDowntime, fallback: Duration(clock.DefaultMaxDowntime),
			min: hour, max: longest, help: "time without any server after which the clock counts as stepped",
		},
	}
}

func (c *Config) collectorSettings() []setting {
	return []setting{
		{
			name: "collector", value: &c.Collector, fallback: collectorOn, oneOf: []string{collectorOn, collectorOff},
			strict: true,
			help: "whether the leader deletes unneeded data by itself: on, or off, which still removes dropped and " +
				"expired snapshots",
		},
		{
			name: "collect_tolerance", value: &c.CollectTolerance, fallback: 3 * hour, min: millisecond, max: longest,
			help: "minimum time between a drop and the deletion by the collector",
		},
		{
			name: "collect_interval", value: &c.CollectInterval, fallback: minute, min: second, max: day,
			help: "time between two rounds of the collector",
		},
		{
			name: "collect_max_share", value: &c.CollectMaxShare, fallback: 0.5, check: c.checkMaxShare, strict: true,
			help: "fraction of a collection of 100 units or more at which a round stops, above 0 and at most 1",
		},
		{
			name: "collect_rate", value: &c.CollectRate, fallback: 3000,
			help: "objects per second that the collector deletes, in bursts of up to 1000; negative: no limit",
		},
		{
			name: "orphan_grace", value: &c.OrphanGrace, fallback: day, min: hour, max: longest,
			help: "minimum age of an object without a record before the collector deletes it, at least 1h",
		},
		{
			name: "gone_id_ranges", value: &c.GoneIDRanges, fallback: catalog.DefaultMaxGoneRanges, min: 1, max: 2048,
			help: "ranges of gone ids in each 4096 ids above which the gaps between them are closed, 1 to 2048",
		},
		{
			name: "gone_id_age", value: &c.GoneIDAge, fallback: Duration(catalog.DefaultGoneGapAge), min: hour, max: longest,
			help: "minimum age of the last gone id before the gaps are closed, at least 1h",
		},
		{
			name: "sweep_interval", value: &c.SweepInterval, fallback: hour, min: second, max: longest,
			help: "time between two sweeps for objects without a record",
		},
	}
}

func (c *Config) processSettings() []setting {
	return []setting{
		{
			name: "grace", value: &c.Grace, fallback: 15 * second, min: millisecond, max: day,
			help: "time that a stop waits for running calls",
		},
		{
			name: "log_level", value: &c.LogLevel, fallback: "info", oneOf: []string{"debug", "info", "warn", "error"},
			help: "debug, info, warn or error",
		},
		{
			name: "log_format", value: &c.LogFormat, fallback: "json", oneOf: []string{"json", "console"},
			help: "json or console",
		},
		{
			name: "replica", value: &c.Replica, check: c.checkReplica,
			help: "unique name of this process (default: made of host, process id and random letters)",
		},
	}
}

// setDefault sets a field that has its zero value to the default.
func (s *setting) setDefault() {
	switch v := s.value.(type) {
	case *string:
		orElse(v, s.fallback)
	case *bool:
		orElse(v, s.fallback)
	case *int:
		orElse(v, s.fallback)
	case *int64:
		orElse(v, s.fallback)
	case *float64:
		orElse(v, s.fallback)
	case *Duration:
		orElse(v, s.fallback)
	}
}

// orElse sets a zero field to the fallback, unless that is nil.
func orElse[T comparable](field *T, fallback any) {
	var zero T
	if d, ok := fallback.(T); ok && *field == zero {
		*field = d
	}
}

// refuseZero returns the error of a strict setting that is zero, or NaN, which YAML
// cannot print, and sets it to the default.
func (s *setting) refuseZero() error {
	if !s.strict {
		return nil
	}
	switch v := s.value.(type) {
	case *string:
		if *v == "" {
			defer s.setDefault()
			return s.validate()
		}
	case *float64:
		if *v == 0 || math.IsNaN(*v) {
			defer func() { *v = 0; s.setDefault() }()
			return s.validate()
		}
	}
	return nil
}

// validate checks the value. The error does not name the setting.
func (s *setting) validate() error {
	var err error
	switch v := s.value.(type) {
	case *string:
		if s.oneOf != nil && !slices.Contains(s.oneOf, *v) {
			last := len(s.oneOf) - 1
			err = fmt.Errorf("%q is not %s or %s", *v, strings.Join(s.oneOf[:last], ", "), s.oneOf[last])
		}
	case *int:
		err = checkBounds(*v, s)
	case *int64:
		err = checkBounds(*v, s)
	case *Duration:
		err = checkBounds(*v, s)
	}
	if err == nil && s.check != nil {
		err = s.check()
	}
	return err
}

func checkBounds[T int | int64 | Duration](v T, s *setting) error {
	lowest, hasMin := s.min.(T)
	highest, hasMax := s.max.(T)
	switch {
	case hasMin && hasMax && (v < lowest || v > highest):
		return fmt.Errorf("%v is not %s to %s", v, boundText(s.min), boundText(s.max))
	case hasMin && v < lowest:
		return fmt.Errorf("%v is less than %s%s", v, boundText(s.min), s.unit)
	}
	return nil
}

// boundText returns a bound as people write it.
func boundText(bound any) string {
	if d, ok := bound.(Duration); ok {
		return d.short()
	}
	return fmt.Sprint(bound)
}

// minimumError adds the minimum of the setting to the error of a zero duration.
func (s *setting) minimumError(err error) error {
	if zero, ok := errors.AsType[*zeroError](err); ok {
		return fmt.Errorf("%q must be at least %s", zero.text, boundText(s.min))
	}
	return err
}

// flagName returns the name of the flag.
func (s *setting) flagName() string {
	if s.flag != "" {
		return s.flag
	}
	return strings.NewReplacer("_", "-", ".", "-").Replace(s.name)
}

// addFlag adds the flag of the setting, whose default is the current value.
func (s *setting) addFlag(fs *pflag.FlagSet) {
	name := s.flagName()
	switch v := s.value.(type) {
	case *string:
		fs.StringVar(v, name, *v, s.help)
	case *bool:
		fs.BoolVar(v, name, *v, s.help)
	case *int:
		fs.IntVar(v, name, *v, s.help)
	case *int64:
		fs.Int64Var(v, name, *v, s.help)
	case *float64:
		fs.Float64Var(v, name, *v, s.help)
	case *[]string:
		fs.StringSliceVar(v, name, *v, s.help)
	case *Duration:
		fs.Var(durationFlag{v, s}, name, s.help)
	case *map[string]ObjectStore:
		fs.Var(&storesFlag{stores: v}, name, s.help)
	}
}

// durationFlag is the flag of a duration. Its errors name the minimum.
type durationFlag struct {
	*Duration
	setting *setting
}

// Set implements pflag.Value.
func (f durationFlag) Set(text string) error { return f.setting.minimumError(f.Duration.Set(text)) }
