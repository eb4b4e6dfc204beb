package embed

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/admit"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
)

// The types of object stores.
const (
	typeFile = "file"
	typeS3   = "s3"
)

// ObjectStore is the configuration of an object store. It holds no secrets, only the
// names of files that hold them.
type ObjectStore struct {
	// Type is "file", a directory, or "s3", a bucket of S3 or of a server that
	// speaks its protocol. Default: "file".
	Type string `json:"type"`
	// Path is the directory of a store of type file.
	Path string `json:"path,omitempty"`

	// Bucket is the bucket. This field and all below belong to the type s3.
	Bucket string `json:"bucket,omitempty"`
	// Prefix is the directory of all keys. Default: none.
	Prefix string `json:"prefix,omitempty"`
	// Region is the bucket's region. Default: "us-east-1".
	Region string `json:"region,omitempty"`
	// Endpoint is the address of a server other than AWS, as https://host:port.
	Endpoint string `json:"endpoint,omitempty"`
	// PathStyle puts the bucket into the path of a request instead of the host's
	// name. Most servers other than AWS need it. Default: false.
	PathStyle bool `json:"path_style,omitempty"`
	// AccessKeyID is the id of the access key. Default: the credentials of the
	// environment, the shared files of AWS, the pod or the machine.
	AccessKeyID string `json:"access_key_id,omitempty"`
	// AccessKeyFile is a file that holds the id, instead of AccessKeyID.
	AccessKeyFile string `json:"access_key_file,omitempty"`
	// SecretKeyFile is the file that holds the access key's secret.
	SecretKeyFile string `json:"secret_key_file,omitempty"`
	// SessionTokenFile is the file that holds the session token, for keys with one.
	SessionTokenFile string `json:"session_token_file,omitempty"`
	// CAFile is a PEM file of authorities that sign the server's certificate, in
	// addition to those that the system trusts.
	CAFile string `json:"ca_file,omitempty"`
	// SSE is the encryption of written objects, "AES256" or "aws:kms". Default: the
	// bucket's setting.
	SSE string `json:"sse,omitempty"`
	// KMSKeyID is the key for "aws:kms". Default: the account's key.
	KMSKeyID string `json:"kms_key_id,omitempty"`
	// ExpectedBucketOwner is the account that must own the bucket. Default: any.
	ExpectedBucketOwner string `json:"expected_bucket_owner,omitempty"`
}

// storesFlag is the flag of the object stores. Its first value replaces all stores,
// each further value adds one.
type storesFlag struct {
	stores *map[string]ObjectStore
	texts  []string // of the values so far
}

func (f *storesFlag) String() string { return strings.Join(f.texts, ",") }
func (*storesFlag) Type() string     { return "alias=directory" }

func (f *storesFlag) Set(text string) error {
	if f.texts == nil {
		*f.stores = map[string]ObjectStore{}
	}
	for part := range strings.SplitSeq(text, ",") {
		alias, where := "default", part
		if !strings.HasPrefix(part, "s3://") {
			var ok bool
			if alias, where, ok = strings.Cut(part, "="); !ok || alias == "" || where == "" {
				return fmt.Errorf("object store %d is not alias=directory or s3://bucket", len(f.texts)+1)
			}
			if strings.Contains(where, "://") && !strings.HasPrefix(where, "s3://") {
				return fmt.Errorf("object store %s: is neither a directory nor s3://bucket", alias)
			}
		}
		if _, ok := (*f.stores)[alias]; ok {
			return fmt.Errorf("duplicate alias %q", alias)
		}
		store := ObjectStore{Type: typeFile, Path: where}
		if strings.HasPrefix(where, "s3://") {
			var err error
			if store, err = parseS3(where); err != nil {
				return fmt.Errorf("object store %s: %w", alias, err)
			}
		}
		(*f.stores)[alias] = store
		f.texts = append(f.texts, part)
	}
	return nil
}

// parseS3 parses s3://bucket/prefix?endpoint=…. Its errors do not repeat the text,
// which may hold a secret by mistake.
func parseS3(text string) (ObjectStore, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Fragment != "" {
		return ObjectStore{}, errors.New("is not s3://bucket/prefix?name=value")
	}
	if u.User != nil {
		return ObjectStore{}, errors.New("must not hold credentials: use access_key_id and secret_key_file")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return ObjectStore{}, errors.New("the text after the question mark is not name=value&name=value")
	}
	s := ObjectStore{Type: typeS3, Bucket: u.Host, Prefix: strings.TrimPrefix(u.Path, "/")}
	fields := map[string]*string{
		"region": &s.Region, "endpoint": &s.Endpoint, "access_key_id": &s.AccessKeyID, "access_key_file": &s.AccessKeyFile,
		"secret_key_file": &s.SecretKeyFile, "session_token_file": &s.SessionTokenFile, "ca_file": &s.CAFile, "sse": &s.SSE,
		"kms_key_id": &s.KMSKeyID, "expected_bucket_owner": &s.ExpectedBucketOwner,
	}
	var errs []error
	for name, values := range query {
		field := fields[name]
		switch {
		case len(values) != 1:
			errs = append(errs, fmt.Errorf("%s has %d values", name, len(values)))
		case name == "path_style":
			if s.PathStyle, err = strconv.ParseBool(values[0]); err != nil {
				errs = append(errs, errors.New("path_style is not true or false"))
			}
		case field == nil:
			errs = append(errs, fmt.Errorf("there is no setting %q", name))
		default:
			*field = values[0]
		}
	}
	return s, errors.Join(errs...)
}

// s3Options returns the options to open a store of type s3, and reads the files that it
// names. It joins all errors; each begins with its field.
func (s ObjectStore) s3Options() (s3.Options, error) {
	var errs []error
	invalid := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	secret := func(field, name string) string {
		if name == "" {
			return ""
		}
		data, err := os.ReadFile(name)
		text := strings.TrimSpace(string(data))
		switch {
		case err != nil:
			invalid("%s: %w", field, err)
		case text == "":
			invalid("%s: %s is empty", field, name)
		}
		return text
	}
	o := s3.Options{
		Bucket: s.Bucket, Prefix: s.Prefix, Region: s.Region, Endpoint: s.Endpoint, PathStyle: s.PathStyle,
		AccessKeyID:     s.AccessKeyID,
		SecretAccessKey: s3.Secret(secret("secret_key_file", s.SecretKeyFile)),
		SessionToken:    s3.Secret(secret("session_token_file", s.SessionTokenFile)),
		CAFile:          s.CAFile, SSE: s.SSE, KMSKeyID: s.KMSKeyID, ExpectedBucketOwner: s.ExpectedBucketOwner,
	}
	if o.Prefix != "" && !strings.HasSuffix(o.Prefix, "/") {
		o.Prefix += "/"
	}
	if id := secret("access_key_file", s.AccessKeyFile); id != "" {
		o.AccessKeyID = id
	}
	hasID := s.AccessKeyID != "" || s.AccessKeyFile != ""
	if s.AccessKeyID != "" && s.AccessKeyFile != "" {
		invalid("access_key_file: access_key_id is set as well")
	}
	switch {
	case hasID && s.SecretKeyFile == "":
		invalid("secret_key_file: is missing; an access key needs one")
	case !hasID && (s.SecretKeyFile != "" || s.SessionTokenFile != ""):
		invalid("access_key_id: is missing; a secret key or session token needs one")
	}
	if s.CAFile != "" {
		if _, err := os.Stat(s.CAFile); err != nil {
			invalid("ca_file: %w", err)
		}
	}
	if hasID { // files are replaced together with their keys
		o.ReadKeys = s.readKeys
	}
	rest := o // the credentials are checked above
	rest.AccessKeyID, rest.SecretAccessKey, rest.SessionToken = "", "", ""
	if err := rest.Validate(); err != nil {
		errs = append(errs, err.(interface{ Unwrap() []error }).Unwrap()...)
	}
	return o, errors.Join(errs...)
}

// readKeys reads the current credentials.
func (s ObjectStore) readKeys() (s3.Keys, error) {
	o, err := s.s3Options()
	return s3.Keys{
		AccessKeyID: o.AccessKeyID, SecretAccessKey: o.SecretAccessKey, SessionToken: o.SessionToken,
	}, err
}

func (c *Config) validateStores(invalid report) {
	aliases := map[string]string{}               // by root
	addRoot := func(field, alias, root string) { // root ends in a slash
		for _, other := range slices.Sorted(maps.Keys(aliases)) {
			switch {
			case other == root:
				invalid(field, "is also that of %s", aliases[other])
			case strings.HasPrefix(other, root) || strings.HasPrefix(root, other):
				invalid(field, "is inside that of %s, or contains it: an object would have two names", aliases[other])
			}
		}
		aliases[root] = alias
	}
	for _, alias := range c.aliases() {
		s := c.ObjectStores[alias]
		field := "object_stores." + alias
		if err := catalog.CheckName("alias", alias); err != nil {
			invalid("object_stores", "%w", err)
		}
		switch s.Type {
		case typeFile:
			if s != (ObjectStore{Type: typeFile, Path: s.Path}) {
				invalid(field+".type", "file has a path and no other fields; did you mean s3?")
			}
			if s.Path == "" {
				invalid(field+".path", "is empty")
				continue
			}
			path, err := filepath.Abs(s.Path)
			if err != nil {
				invalid(field+".path", "%w", err)
				continue
			}
			addRoot(field+".path", alias, strings.TrimSuffix(path, "/")+"/")
		case typeS3:
			if s.Path != "" {
				invalid(field+".path", "is of no use for type s3; did you mean prefix?")
			}
			o, err := s.s3Options()
			if err != nil {
				for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
					name, text, _ := strings.Cut(e.Error(), ": ")
					invalid(field+"."+name, "%s", text)
				}
				continue
			}
			addRoot(field+".prefix", alias, "s3://"+o.Endpoint+"/"+o.Bucket+"/"+o.Prefix)
		default:
			invalid(field+".type", "%q is not file or s3", s.Type)
		}
	}
	if _, ok := c.ObjectStores[c.SnapshotStore]; !ok {
		invalid("snapshot_store", "there is no object store %q, only %s", c.SnapshotStore, strings.Join(c.aliases(), ", "))
	}
}

// startWait is the time for which a start waits for the object stores.
const startWait = 10 * time.Second

// openStores opens the object stores, tries to admit all of them in parallel, and adds
// their close functions to open. A store that does not answer is not admitted yet: the
// server starts without it. A store that refuses writes is admitted for reads. The
// start fails for a store that is refused, and for a store that is new to the cluster
// and is full or does not answer.
func openStores(ctx context.Context, cfg Config, kv meta.KV, p *parts, open *closers) (map[string]*admit.Store, error) {
	stores, cluster, log := map[string]*admit.Store{}, p.cluster.ID, p.log
	aliases := cfg.aliases()
	for _, alias := range aliases {
		o, err := openStore(ctx, cfg, alias, log.With(zap.String("store", alias)), open)
		if err != nil {
			return nil, fmt.Errorf("object store %s: %w", alias, err)
		}
		if cfg.Decorators.Store != nil {
			o.Store = cfg.Decorators.Store(o.Store)
		}
		o.Alias, o.KV, o.Cluster, o.Now, o.Rand, o.Log = alias, kv, cluster, time.Now, rand.Reader, log.Named("admit")
		o.Problems, o.InUse = p.problems, aliases
		if alias == cfg.SnapshotStore {
			history := epoch.New(epoch.Options{
				KV: kv, Store: o.Store, Cluster: cluster, Now: time.Now, Rand: rand.Reader, Log: log.Named("epoch"),
				Problems: p.problems,
			})
			o.Check = func(ctx context.Context) error {
				// A metadata store that is behind does not end the start: only a running
				// server can recover it.
				if err := history.Check(ctx); !errors.Is(err, epoch.ErrRolledBack) {
					return err
				}
				return nil
			}
		}
		stores[alias] = admit.New(o)
	}
	bounded, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	errs := make([]error, len(stores))
	var wg sync.WaitGroup
	for i, alias := range aliases {
		wg.Go(func() { errs[i] = stores[alias].Attempt(bounded) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil && (ctx.Err() != nil || !admit.Pending(err) || errors.Is(err, admit.ErrUnknown)) {
			return nil, err
		}
	}
	return stores, nil
}

// openStore opens the store of an alias without a request to it.
func openStore(ctx context.Context, cfg Config, alias string, log *zap.Logger, open *closers) (admit.Options, error) {
	c := cfg.ObjectStores[alias]
	if c.Type == typeFile {
		shared := len(cfg.EtcdEndpoints) > 0
		o := file.Options{Shared: shared, Mark: identity.Key}
		s, err := file.Open(c.Path, o) //nolint:contextcheck // a local directory
		if errors.Is(err, file.ErrInUse) {
			return admit.Options{}, fmt.Errorf(
				"%w: %w; end it, or choose another path: only replicas of one cluster share a directory", ErrInUse, err)
		}
		if err != nil {
			return admit.Options{}, err
		}
		open.add(s.Close)
		return admit.Options{Store: s}, nil
	}
	o, err := c.s3Options()
	if err != nil {
		return admit.Options{}, err
	}
	o.Log, o.WrapTransport = log.Named("s3"), cfg.Decorators.Transport
	s, err := s3.Open(ctx, o)
	if err != nil {
		return admit.Options{}, err
	}
	open.add(s.Close)
	about, err := json.Marshal(c)
	if err != nil {
		return admit.Options{}, err
	}
	sum := sha256.Sum256(append(about, cfg.Version...))
	return admit.Options{Store: s, Fingerprint: sum[:]}, nil
}

// notReady returns the aliases of the stores that are not admitted yet, sorted.
func notReady(stores map[string]*admit.Store) []string {
	var list []string
	for _, alias := range slices.Sorted(maps.Keys(stores)) {
		select {
		case <-stores[alias].Ready():
		default:
			list = append(list, alias)
		}
	}
	return list
}

// degraded returns a text about the stores that are not admitted yet and those that
// refuse writes; empty: none.
func degraded(stores map[string]*admit.Store) string {
	var list []string
	if pending := notReady(stores); len(pending) > 0 {
		list = append(list, "without object store "+strings.Join(pending, ", ")+
			", which has not answered since the start: calls that need it are refused")
	}
	for _, alias := range slices.Sorted(maps.Keys(stores)) {
		if stores[alias].NoWrites() != nil {
			list = append(list, "object store "+alias+" takes no writes: calls that write there are refused, all others go on")
		}
	}
	return strings.Join(list, "; ")
}
