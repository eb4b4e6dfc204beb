package embed

import (
	"math"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"

	"github.com/snapshotd/snapshotd/test/allocated"
)

// sameConfig are the options to compare configurations.
var sameConfig = []cmp.Option{cmpopts.EquateEmpty(), cmpopts.EquateNaNs()}

// checkConfig checks that a loaded configuration is complete, that Validate returns the
// same error twice, and that the written configuration loads as the same one.
func checkConfig(t *testing.T, dir string, c Config) {
	t.Helper()
	if diff := cmp.Diff(c, c.complete(), sameConfig...); diff != "" {
		t.Errorf("defaults set a second time (-once +twice):\n%s", diff)
	}
	if !namesFiles(c) {
		err := c.Validate()
		if again := c.Validate(); (err == nil) != (again == nil) || err != nil && err.Error() != again.Error() {
			t.Errorf("%v, and then %v", err, again)
		}
		if err == nil && (c.Collector != collectorOn && c.Collector != collectorOff || c.MaxCreates < 1 ||
			!(c.CollectMaxShare > 0)) {
			t.Errorf("%+v is valid", c)
		}
	}
	data, err := c.YAML()
	if math.IsNaN(c.CollectMaxShare) || math.IsInf(c.CollectMaxShare, 0) { // no configuration
		return
	}
	if err != nil && strings.Contains(err.Error(), "control characters are not allowed") { // YAML allows none
		return
	}
	if err != nil {
		t.Fatalf("write the configuration: %v", err)
	}
	file := filepath.Join(dir, "again.yaml")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := LoadConfig(file, nil, nil)
	if err != nil {
		t.Fatalf("load the written configuration: %v\n%s", err, data)
	}
	if diff := cmp.Diff(c, again, sameConfig...); diff != "" {
		t.Errorf("(-loaded +written and loaded):\n%s", diff)
	}
}

// namesFiles reports whether Validate would read files, which a fuzz test must not choose.
func namesFiles(c Config) bool {
	for _, s := range c.ObjectStores {
		if s.AccessKeyFile+s.SecretKeyFile+s.SessionTokenFile+s.CAFile != "" {
			return true
		}
	}
	return c.TLS != TLS{} || c.EtcdTLS != EtcdTLS{} || c.EtcdPasswordFile != ""
}

// FuzzConfigFile loads any data as a configuration file. A loaded configuration loads
// as the same one after it is written; an error names the file.
func FuzzConfigFile(f *testing.F) {
	sound, err := Default().YAML()
	if err != nil {
		f.Fatal(err)
	}
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for i := range 8 {
		name, last := string(rune('b'+i)), "*"+string(rune('a'+i))
		bomb += name + ": &" + name + " [" + strings.Join(slices.Repeat([]string{last}, 9), ",") + "]\n"
	}
	for _, s := range []string{
		"", string(sound), "collector: on", "collector: off", "grace: 0s", "grace: 5", "grace: -1s",
		"grace: 2562047h47m16.854775807s", "max_creates: 1e3", "max_creates: 99999999999999999999",
		"etcd_quota_bytes: 9007199254740993", "etcd_quota_bytes: 9223372036854775807", "collect_max_share: .nan",
		"collect_max_share: 1e400", "collect_max_share: 0.1", "object_stores: {a: {type: s3, bucket: b}}",
		"object_stores: {a: null}", "object_stores: []",
		"etcd_endpoints: [a, 1, null]", "no_such: 1", "tls: {cart: x}", "listen: 1", "listen: ~", "Listen: x",
		"listen: a\nlisten: b", "listen: &a [*a]", "data_dir: \"\\0\"", "- a", "%YAML 9", "\xff", "? [a]\n: b",
		"!!binary gA==: 1", "listen: !!binary gA==", "replica: \"\\xff\"", bomb,
		"object_stores: {\"a=b,c\": {path: \"x,y\"}}", "etcd_tls: {ca: x}", "1: 2", "null: 1", "grace: {}",
	} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		file := filepath.Join(dir, "c.yaml")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		var c Config
		var err error
		if took := allocated.Bytes(func() { c, err = LoadConfig(file, nil, nil) }); took > uint64(32<<20+20_000*len(data)) {
			t.Errorf("%d bytes took %d bytes of memory", len(data), took)
		}
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") { // these settings are named without the file
				if strings.HasPrefix(line, "configuration "+file+": ") {
					break
				}
				if !strings.HasPrefix(line, "collector: ") && !strings.HasPrefix(line, "collect_max_share: ") {
					t.Errorf("%v: no setting is named", err)
				}
			}
			return
		}
		checkConfig(t, dir, c)
	})
}

// FuzzConfigFlag sets any flag to any text, with the same result on the command line and
// in the environment.
func FuzzConfigFlag(f *testing.F) {
	var names []string
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	new(Config).Flags(set)
	set.VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	for i := range names {
		for _, text := range []string{"1", "1m", "\"", "NaN"} {
			f.Add(uint(i), text)
		}
	}
	for _, text := range []string{
		"true", "a,b", "a=b", "default=s3://bucket/x?region=r,cold=/dir", "1e2", "0x10", "\xff",
		"-1", "off", "a\x7f", "\"a,b\",c", "\"a\"\"b\"",
	} {
		f.Add(uint(slices.Index(names, "object-store")), text)
		f.Add(uint(slices.Index(names, "etcd-endpoints")), text)
		f.Add(uint(slices.Index(names, "data-dir")), text)
		f.Add(uint(slices.Index(names, "collect-rate")), text)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, flag uint, text string) {
		name := names[flag%uint(len(names))]
		if text == "" { // counts as unset in the environment
			return
		}
		byEnv, errEnv := LoadConfig("", func(v string) (string, bool) { return text, v == EnvName(name) }, nil)
		scratch := Default()
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		scratch.Flags(flags)
		errFlag := flags.Parse([]string{"--" + name + "=" + text})
		var byFlag Config
		if errFlag == nil {
			byFlag, errFlag = LoadConfig("", nil, flags)
		}
		if (errEnv == nil) != (errFlag == nil) {
			t.Fatalf("%s = %q: as a flag %v, in the environment %v", name, text, errFlag, errEnv)
		}
		if errEnv != nil {
			if !strings.Contains(errEnv.Error(), EnvName(name)) &&
				!strings.HasPrefix(errEnv.Error(), strings.ReplaceAll(name, "-", "_")+": ") {
				t.Errorf("%v: no setting is named", errEnv)
			}
			return
		}
		if diff := cmp.Diff(byEnv, byFlag, sameConfig...); diff != "" {
			t.Errorf("%s = %q (-in the environment +as a flag):\n%s", name, text, diff)
		}
		if strings.ToValidUTF8(text, "") == text { // a file holds only UTF-8
			checkConfig(t, dir, byEnv)
		}
	})
}

// FuzzStoreURL parses any text as an object store. A parsed store parses as the same one
// after it is written; a password in the text is refused and not repeated.
func FuzzStoreURL(f *testing.F) {
	for _, s := range []string{
		"s3://bucket", "s3://bucket/", "s3://bucket/a/b/", "s3://bucket//a", "s3://bucket/a%2fb", "s3://b:9/x",
		"s3://[::1]/x", "s3://b?region=r&endpoint=http://h:1/&path_style=1", "s3://b?path_style=maybe",
		"s3://b?region=a&region=b", "s3://b?x=1", "s3://b?region", "s3://b?;", "s3://b?%zz", "s3://b#f", "s3://b#",
		"s3://me:pw@b", "s3://", "s3:///x", "s3://b/\x7f", "s3://B\xff", "file:///x", "", "s3://b/%00",
		"s3://b?sse=AES256&kms_key_id=k&expected_bucket_owner=1",
		"s3://%62ucket", "s3://b c/", "s3://b/../x", "s3://b?region=%ff",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseS3(text)
		if err == nil && strings.HasPrefix(text, "s3://") {
			checkStore(t, text, s)
		}
		const secret = "canary-7f" //nolint:gosec // not a real secret
		for _, form := range []string{"s3://me:" + secret + "@" + text, "cold=s3://me:" + secret + "@" + text} {
			c := Default()
			err := (&storesFlag{stores: &c.ObjectStores}).Set(form)
			if err == nil {
				t.Errorf("no error for %q", form)
			} else if strings.Contains(err.Error(), secret) {
				t.Errorf("%q is repeated: %v", form, err)
			}
		}
	})
}

// checkStore writes a store as a text and parses it.
func checkStore(t *testing.T, text string, s ObjectStore) {
	t.Helper()
	if s.Type != typeS3 || s.Bucket == "" || s.Path != "" {
		t.Errorf("%q is %+v", text, s)
	}
	query := url.Values{}
	for name, value := range map[string]string{
		"region": s.Region, "endpoint": s.Endpoint, "access_key_id": s.AccessKeyID, "access_key_file": s.AccessKeyFile,
		"secret_key_file":    s.SecretKeyFile,
		"session_token_file": s.SessionTokenFile, "ca_file": s.CAFile, "sse": s.SSE, "kms_key_id": s.KMSKeyID,
		"expected_bucket_owner": s.ExpectedBucketOwner,
		"path_style":            strconv.FormatBool(s.PathStyle),
	} {
		if value != "" {
			query.Set(name, value)
		}
	}
	written := url.URL{Scheme: "s3", Host: s.Bucket, Path: "/" + s.Prefix, RawQuery: query.Encode()}
	again, err := parseS3(written.String())
	if err != nil {
		t.Fatalf("%q is %+v, written as %q: %v", text, s, written.String(), err)
	}
	if diff := cmp.Diff(s, again); diff != "" {
		t.Errorf("%q, written as %q (-parsed +written and parsed):\n%s", text, written.String(), diff)
	}
	if s.AccessKeyFile+s.SecretKeyFile+s.SessionTokenFile+s.CAFile != "" {
		return // a fuzz test must not choose files to read
	}
	o, err := s.s3Options()
	if err == nil && (o.Bucket != s.Bucket || !strings.HasPrefix(o.Prefix, s.Prefix) || o.Prefix != "" &&
		!strings.HasSuffix(o.Prefix, "/")) {
		t.Errorf("%q is opened as %+v", text, o)
	}
	c := Config{SnapshotStore: "a", ObjectStores: map[string]ObjectStore{"a": s}}
	if valid := c.Validate(); (valid == nil) != (err == nil) {
		t.Errorf("%q: %v, but to open it: %v", text, valid, err)
	}
}
