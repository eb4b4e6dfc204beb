package embed_test

import (
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/snapshotd/snapshotd/embed"
)

func TestDefaultIsValid(t *testing.T) {
	for _, c := range []embed.Config{embed.Default(), {}} {
		if err := c.Validate(); err != nil {
			t.Error(err)
		}
	}
}

// TestValidateNamesEveryField returns an error for each invalid field.
func TestValidateNamesEveryField(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := embed.Config{
		Listen: "nowhere", MetricsListen: "0.0.0.0:7951", EtcdRoot: "x/",
		EtcdEndpoints: []string{"", "http://me:secret@host:2379"},
		EtcdTLS:       embed.EtcdTLS{Cert: "c.pem"}, EtcdUsername: "me", EtcdPasswordFile: empty, EtcdQuotaBytes: 1,
		ObjectStores: map[string]embed.ObjectStore{
			"a": {Type: "tape"}, "b": {}, "c": {Path: "x"}, "d": {Path: "./x"}, "../e": {Path: "y"},
		},
		SnapshotStore: "none", NameScope: "galaxy", TLS: embed.TLS{Cert: "c.pem"}, MaxConnections: -1,
		CreateTimeout: embed.Duration(time.Millisecond), CreateLeaseTTL: 1, LeaderTTL: embed.Duration(48 * time.Hour),
		Grace:      -1,
		MaxCreates: -1, LogLevel: "loud", LogFormat: "xml", Replica: "a b",
		Collector: "perhaps", CollectTolerance: -1, CollectInterval: 1, CollectMaxShare: 1.5,
		OrphanGrace: embed.Duration(time.Minute), SweepInterval: -1,
	}
	err := c.Validate()
	if err == nil {
		t.Fatal("no errors")
	}
	for _, want := range []string{
		"listen: ", "metrics_listen: ", "etcd_root: ", "etcd_endpoints[0]: ", "etcd_endpoints[1]: ", "etcd_tls: ",
		"etcd_password_file: ",
		"etcd_quota_bytes: ", "object_stores.a.type: ", "object_stores.b.path: ", "object_stores.d.path: ",
		"object_stores: ", "snapshot_store: ",
		"name_scope: ", "tls: ", "max_connections: ", "create_timeout: ", "create_lease_ttl: ", "leader_ttl: ", "grace: ",
		"max_creates: ",
		"log_level: ", "log_format: ", "replica: ", "collector: ", "collect_tolerance: ", "collect_interval: ",
		"collect_max_share: ",
		"orphan_grace: ", "sweep_interval: ",
	} {
		if !strings.Contains("\n"+err.Error(), "\n"+want) {
			t.Errorf("nothing about %s", want)
		}
	}
	if strings.Contains(err.Error(), "secret") {
		t.Error("a password is printed")
	}
	if _, startErr := embed.Start(t.Context(), c); startErr == nil || !strings.Contains(startErr.Error(), err.Error()) {
		t.Errorf("Start: got %v", startErr)
	}
}

// TestPublicAddresses refuses addresses that other hosts reach, unless that is allowed.
func TestPublicAddresses(t *testing.T) {
	for addr, refused := range map[string]bool{
		"127.0.0.1:1": false, "127.9.9.9:1": false, "[::1]:1": false, "localhost:1": false,
		":1": true, "0.0.0.0:1": true, "[::]:1": true, "10.0.0.1:1": true, "example.com:1": true,
	} {
		err := embed.Config{Listen: addr}.Validate()
		if (err != nil) != refused || refused && !strings.Contains(err.Error(), "set tls.cert, tls.key and tls.client_ca") {
			t.Errorf("listen %s: got %v", addr, err)
		}
		err = embed.Config{MetricsListen: addr}.Validate()
		if (err != nil) != refused || refused && !strings.Contains(err.Error(), "set metrics_public") {
			t.Errorf("metrics_listen %s: got %v", addr, err)
		}
		if err := (embed.Config{MetricsListen: addr, MetricsPublic: true}).Validate(); err != nil {
			t.Errorf("public metrics_listen %s: got %v", addr, err)
		}
	}
}

// TestCollectorSettings reads on and off, which YAML takes for booleans, and the share.
func TestCollectorSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	for text, want := range map[string]string{
		"": "on", "collector: on": "on", "collector: off": "off", `collector: "off"`: "off", "collector: yes": "on",
		"collector: false": "off",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := embed.LoadConfig(file, nil, nil)
		if err != nil || c.Collector != want {
			t.Errorf("%q: got %q, err = %v", text, c.Collector, err)
		}
		if err := c.Validate(); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	for share, invalid := range map[float64]bool{
		-1: true, 0: false, 1e-9: false, 1: false, 1.01: true, math.NaN(): true,
		math.Inf(1): true,
	} {
		if err := (embed.Config{CollectMaxShare: share}).Validate(); (err != nil) != invalid {
			t.Errorf("share %v: %v", share, err)
		}
	}
	if err := (embed.Config{CollectRate: -1}).Validate(); err != nil {
		t.Error(err)
	}
}

func environment(vars map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
}

// TestPrecedence has flags win over the environment, and that over the file.
func TestPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte(`
data_dir: file
listen: 127.0.0.1:1
metrics_listen: "off"
create_timeout: 1m30s
etcd_endpoints: [a:1, b:2]
object_stores:
  default: {path: /file}
tls: {cert: x}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	scratch := embed.Default()
	scratch.Flags(flags)
	if err := flags.Parse([]string{
		"--data-dir=flag", "--object-store=default=/flag", "--object-store=more=/more",
		"--etcd-endpoints=c:3,d:4", "--metrics-public",
	}); err != nil {
		t.Fatal(err)
	}
	got, err := embed.LoadConfig(file, environment(map[string]string{
		"SNAPSHOTD_DATA_DIR": "env", "SNAPSHOTD_LISTEN": "127.0.0.1:2", "SNAPSHOTD_OBJECT_STORE": "default=/env",
		"SNAPSHOTD_MAX_CREATES": "3",
		"SNAPSHOTD_LOG_LEVEL":   "", "SNAPSHOTD_PORT": "tcp://10.0.0.1:7950", // Kubernetes sets it for a service
	}), flags)
	if err != nil {
		t.Fatal(err)
	}
	want := embed.Default()
	want.DataDir, want.Listen, want.MetricsListen, want.MetricsPublic = "flag", "127.0.0.1:2", "off", true
	want.CreateTimeout, want.EtcdEndpoints, want.MaxCreates = embed.Duration(90*time.Second), []string{"c:3", "d:4"}, 3
	want.ObjectStores = map[string]embed.ObjectStore{
		"default": {Type: "file", Path: "/flag"},
		"more":    {Type: "file", Path: "/more"},
	}
	want.TLS.Cert = "x"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	// The printed configuration loads as the same one.
	data, err := got.YAML()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := embed.LoadConfig(file, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, again, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("%s\n%s", diff, data)
	}
}

// TestFormErrors names the setting, its source and the expected form.
func TestFormErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	for text, want := range map[string]string{
		"data_dirr: x":             `there is no setting "data_dirr"`,
		"data_dir: x\ndata_dir: y": "data_dir",
		"max_creates: many":        "max_creates: a whole number is expected, not string",
		"max_creates: 1.5":         "max_creates: a whole number is expected, not number 1.5",
		"collect_max_share: half":  "collect_max_share: a number is expected, not string",
		"metrics_public: 1":        "metrics_public: true or false is expected, not number",
		"etcd_endpoints: a:1":      "etcd_endpoints: a list is expected, not string",
		"tls: x":                   "tls: names with values is expected, not string",
		"tls: {cert: [x]}":         "tls.cert: text is expected, not array",
		"create_timeout: 10":       "create_timeout: a time span such as 1m30s or 7d is expected, not number",
		"create_timeout: soon":     `create_timeout: "soon" is not a time span such as 1m30s or 7d`,
		"create_timeout: 0s":       `create_timeout: "0s" must be at least 1s`,
		"orphan_grace: 0d":         `orphan_grace: "0d" must be at least 1h`,
		"orphan_grace: 1.5d":       `orphan_grace: "1.5d" is not a time span such as 1m30s or 7d`,
		"collect_max_share: 0":     "collect_max_share: 0 is not above 0 and at most 1",
		"collect_max_share: .nan":  "collect_max_share: NaN is not a finite number",
		`collector: ""`:            `collector: "" is not on or off`,
		"grace: x\nlog_level: [x]": "grace: \"x\" is not a time span such as 1m30s or 7d\nlog_level: text is expected, " +
			"not array",
		"object_stores: {a: {p: x}}": `object_stores: there is no setting "p"`,
		"object_stores: {a: x}":      "object_stores",
		"[":                          "",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := embed.LoadConfig(file, nil, nil); err == nil || !strings.Contains(err.Error(), want) ||
			!strings.Contains(err.Error(), file) {
			t.Errorf("%q: got %v", text, err)
		}
	}
	if _, err := embed.LoadConfig(filepath.Join(t.TempDir(), "none"), nil, nil); err == nil {
		t.Error("no error for a missing file")
	}
	_, err := embed.LoadConfig("", environment(map[string]string{
		"SNAPSHOTD_MAX_CREATES": "x", "SNAPSHOTD_GRACE": "y", "SNAPSHOTD_LEADER_TTL": "0", "SNAPSHOTD_OBJECT_STORE": "z",
		"SNAPSHOTD_METRICS_PUBLIC": "perhaps", "SNAPSHOTD_ETCD_QUOTA_BYTES": "99999999999999999999",
		"SNAPSHOTD_COLLECT_MAX_SHARE": "half",
	}), nil)
	for _, want := range []string{
		`SNAPSHOTD_MAX_CREATES: "x" is not a whole number`, `SNAPSHOTD_GRACE: "y" is not a time span such as 1m30s`,
		`SNAPSHOTD_LEADER_TTL: "0" must be at least 2s`, "SNAPSHOTD_OBJECT_STORE: object store 1 is not alias=",
		`SNAPSHOTD_METRICS_PUBLIC: "perhaps" is not true or false`,
		`SNAPSHOTD_ETCD_QUOTA_BYTES: "99999999999999999999" is out of range`,
		`SNAPSHOTD_COLLECT_MAX_SHARE: "half" is not a number`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %s in %v", want, err)
		}
	}
}

// TestEveryFieldHasAFlag fails for a field that is not in the table of settings.
func TestEveryFieldHasAFlag(t *testing.T) {
	exceptions := map[string]string{"object_stores": "object-store"}
	var c embed.Config
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	c.Flags(flags)
	count := 0
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for f := range typ.Fields() {
			tag := f.Tag.Get("json")
			if tag == "-" {
				continue
			}
			name := prefix + tag
			if f.Type.Kind() == reflect.Struct {
				walk(strings.TrimSuffix(name, "tls")+map[bool]string{true: "tls_"}[tag == "tls"], f.Type)
				continue
			}
			count++
			flag := strings.ReplaceAll(name, "_", "-")
			if exceptions[name] != "" {
				flag = exceptions[name]
			}
			if flags.Lookup(flag) == nil {
				t.Errorf("%s has no flag --%s", name, flag)
			}
		}
	}
	walk("", reflect.TypeFor[embed.Config]())
	flags.VisitAll(func(f *pflag.Flag) {
		count--
		if !regexp.MustCompile(`^SNAPSHOTD_[A-Z_]+$`).MatchString(embed.EnvName(f.Name)) {
			t.Errorf("variable %s", embed.EnvName(f.Name))
		}
	})
	if count != 0 {
		t.Errorf("%d more fields than flags", count)
	}
	data, err := embed.Default().YAML()
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := yaml.Unmarshal(data, &m); err != nil || m["max_creates"] != 64. {
		t.Errorf("got %v, %v", m, err)
	}
}
