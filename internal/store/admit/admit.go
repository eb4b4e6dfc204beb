// Package admit keeps an object store closed until it has checked that the store is
// the cluster's and has the required features. So a replica starts without an answer
// from an object store, and serves the calls that need the metadata store only; and it
// writes and deletes nothing in a store before it has checked its identity.
//
// # States
//
//	         identify, record, check              probe
//	closed --------------------------> readable ---------> open
//	   |                                  |
//	   +----------------------------------+--- refused: an error, which ends the process
//
// A closed store answers every call with ErrUnavailable. A readable one is the cluster's:
// it reads, lists and deletes, so that a full store can be emptied. It refuses writes
// with the error of the probe, for the store may lose them. An open store stays open. For
// an unknown alias the probe comes first: there is nothing to read, and the record is a
// write.
//
// # An attempt
//
//	identify  for a known alias: reads the identity of the store and compares it.
//	          Nothing is written before
//	check     the caller's check; for an unknown alias it is the last step
//	probe     tests the store's features, unless the metadata store has a verdict on
//	          the same release and configuration that is younger than a day
//	remember  puts the verdict, when the probe found all required features
//	record    for an unknown alias: package identity creates or reads an identity,
//	          and records it
//
// # Failures
//
//	no answer of either store, in   the store stays closed; Run tries again. For an
//	a step other than the probe     unknown alias, the error also is an ErrUnknown
//	probe: full, no answer, writes  the store stays readable; Run tries again. There is
//	denied                          no verdict
//	copies cannot be tested, for    the store is open; its features are unknown, and
//	example a right is missing      there is no verdict. Features tests again
//	copies are unsafe               likewise: a store may be upgraded, and a gateway
//	                                replaced, while the replica runs
//	another store; a required       refused: Attempt and Run return the error
//	feature is missing
//	denied, misconfigured, damaged  Attempt returns the error, which ends a start; Run,
//	                                in a serving replica, logs it and tries again
//	remember: no answer             logged; the next start probes again
//	process dies, freezes           objects of the probe remain, which the sweep
//	                                removes
//
// # Refused writes
//
// An open store may refuse writes, when it is full or denies them. The first refusal is
// logged, and refusals are counted until a write succeeds; meanwhile [Store.NoWrites]
// returns the error.
package admit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// ErrUnknown means that the cluster has no record of the alias, so that nothing can be
// served without the store.
var ErrUnknown = errors.New("the cluster does not know this object store yet")

const (
	// verdictTTL is the age up to which a verdict replaces a probe.
	verdictTTL = 24 * time.Hour
	// attemptTimeout bounds an attempt of Run.
	attemptTimeout = time.Minute
	// minWait and maxWait bound the time between attempts of Run.
	minWait = time.Second
	maxWait = 30 * time.Second
	// retestInterval is the minimum time between two tests of copies by Features.
	retestInterval = 10 * time.Second
)

// Options configures a Store.
type Options struct {
	Store   object.Store // to admit
	Alias   string
	InUse   []string // all aliases of this replica
	KV      meta.KV
	Cluster string // the cluster's id
	// Fingerprint is the SHA-256 of the release and the configuration of the store. Empty:
	// the store is not probed, and has all features.
	Fingerprint []byte
	// Check is an additional step; nil: none.
	Check func(ctx context.Context) error
	Now   func() time.Time
	Rand  io.Reader
	Log   *zap.Logger
	// Problems receives the store's problems. Default: a new list.
	Problems *lasting.Problems
}

// Store is an object store that is closed until it is admitted. It is safe for
// concurrent use.
type Store struct {
	o      Options
	ready  chan struct{} // closed when the store is readable
	opened chan struct{} // closed when it is open

	admission *lasting.Problem
	writes    *lasting.Problem

	mu       sync.Mutex
	features features
	last     error // of the last attempt

	retest sync.Mutex // held by the call that tests copies again
}

// features are the optional features of a store, as its last probe found them.
type features struct {
	probe.Features

	unknown error     // reason for the unknown safety of copies; nil: known
	decided bool      // all features are known
	at      time.Time // of the test; zero: from a verdict, or not tested
}

var _ object.Store = (*Store)(nil)

// New returns a Store that is closed.
func New(o Options) *Store {
	if o.Problems == nil {
		o.Problems = lasting.New(o.Now)
	}
	log := o.Log.With(zap.String("store", o.Alias))
	return &Store{
		o: o, ready: make(chan struct{}), opened: make(chan struct{}), last: errors.New("no attempt yet"),
		admission: o.Problems.Add(log, "store admission "+o.Alias,
			"the object store is not admitted yet: calls that need it are refused",
			"everything that needs object store "+o.Alias),
		writes: o.Problems.Add(log, "store writes "+o.Alias,
			"the object store refuses writes; reads, lists and deletes go on",
			"writes to object store "+o.Alias),
	}
}

// Ready returns a channel that is closed once the store is identified and readable.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// NoWrites returns the error of the last write when it was refused, else nil.
func (s *Store) NoWrites() error {
	if state := s.writes.State(); state.Error != "" {
		return errors.New(state.Error)
	}
	return nil
}

// Features returns the store's features. The error is an ErrUnavailable while the store is
// closed, and the error of the probe while it is not open.
//
// With retest it tests the copies of a store again whose conditional copies are missing or
// unknown, at most once per retestInterval. A feature that is still unknown is an error
// with the reason.
func (s *Store) Features(ctx context.Context, retest bool) (probe.Features, error) {
	if err := s.checkOpen(); err != nil {
		return probe.Features{}, err
	}
	if retest {
		s.retestCopies(ctx)
	}
	f := s.known()
	return f.Features, f.unknown
}

func (s *Store) known() features {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.features
}

// retestCopies tests copies again when it is due.
func (s *Store) retestCopies(ctx context.Context) {
	due := func() bool {
		f := s.known()
		return (!f.decided || !f.ConditionalCopy) && time.Since(f.at) >= retestInterval
	}
	if !due() {
		return
	}
	s.retest.Lock() // concurrent calls wait for the result
	defer s.retest.Unlock()
	if !due() {
		return
	}
	report, err := probe.Copies(ctx, s.o.Store, "")
	if err != nil {
		return // ctx ended: there is no result
	}
	f := s.featuresOf(ctx, report)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.features = f
}

// Pending reports whether an error of Attempt says nothing about the store: it, or the
// metadata store, did not answer or was full.
func Pending(err error) bool {
	for _, e := range []error{
		object.ErrUnavailable, object.ErrFull, meta.ErrUnavailable, meta.ErrNoSpace, context.DeadlineExceeded,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Attempt makes one attempt to admit the store, and returns nil when it is readable or
// open. See [Pending] for its errors.
func (s *Store) Attempt(ctx context.Context) error {
	if isClosed(s.opened) {
		return nil
	}
	found, readable, err := s.attempt(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = err
	switch {
	case isClosed(s.opened):
		return nil
	case err == nil:
		s.features = found
		s.admission.Passed()
		s.writes.Passed()
		s.setReady()
		close(s.opened)
		return nil
	case readable && (Pending(err) || errors.Is(err, object.ErrDenied)):
		s.admission.Passed()
		s.writes.Failed(err)
		s.setReady()
		return nil
	}
	if Pending(err) && !errors.Is(err, ErrUnknown) {
		s.admission.Failed(err)
	}
	return fmt.Errorf("object store %s: %w", s.o.Alias, err)
}

// setReady makes the store readable. The lock must be held.
func (s *Store) setReady() {
	if !isClosed(s.ready) {
		close(s.ready)
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// Run makes attempts until the store is open or ctx ends, and then returns nil. It returns
// the error of an attempt that found another store or a missing feature.
func (s *Store) Run(ctx context.Context) error {
	for wait := time.Duration(0); ; wait = min(max(2*wait, minWait), maxWait) {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-s.opened:
			timer.Stop()
			return nil
		case <-timer.C:
		}
		bounded, cancel := context.WithTimeout(ctx, attemptTimeout)
		err := s.Attempt(bounded)
		cancel()
		switch {
		case errors.Is(err, identity.ErrOther) || errors.Is(err, identity.ErrTwice) || errors.Is(err, probe.ErrMissing):
			return err
		case err != nil && !Pending(err) && ctx.Err() == nil: // Attempt has logged the others
			s.admission.Failed(err)
		case err == nil && isClosed(s.opened):
			s.o.Log.Info("the object store is admitted: calls that need it are served", zap.String("store", s.o.Alias))
			return nil
		}
	}
}

// attempt returns the store's features. The store is readable when only the probe failed.
func (s *Store) attempt(ctx context.Context) (found features, readable bool, err error) {
	known, err := identity.Known(ctx, s.o.KV, s.o.Store, s.o.Alias)
	if err != nil {
		return found, false, err
	}
	if known {
		if err := s.check(ctx); err != nil {
			return found, false, err
		}
		found, err = s.probeOrAssume(ctx)
		return found, true, err
	}
	found, err = s.probeOrAssume(ctx)
	if err == nil {
		err = identity.Check(ctx, s.o.KV, s.o.Store, s.o.Alias, s.o.Cluster, s.o.Rand, s.o.InUse...)
	}
	if err == nil {
		err = s.check(ctx)
	}
	if err != nil {
		err = fmt.Errorf("%w (%w)", err, ErrUnknown)
	}
	return found, false, err
}

func (s *Store) check(ctx context.Context) error {
	if s.o.Check == nil {
		return nil
	}
	return s.o.Check(ctx)
}

// probeOrAssume returns the store's features: all of them without a fingerprint.
func (s *Store) probeOrAssume(ctx context.Context) (features, error) {
	if len(s.o.Fingerprint) == 0 {
		return features{Features: probe.Features{ConditionalCopy: true, MultipartCopy: true}, decided: true}, nil
	}
	return s.probeOnce(ctx)
}

// probeOnce returns the features of a recent verdict, or of a probe.
func (s *Store) probeOnce(ctx context.Context) (features, error) {
	kv, known, _, err := s.o.KV.Get(ctx, keys.Verdict(s.o.Alias))
	if err != nil {
		return features{}, err
	}
	verdict := &storagev1.StoreVerdict{}
	if known && record.Decode(kv, verdict) == nil && bytes.Equal(verdict.GetAbout(), s.o.Fingerprint) {
		age := s.o.Now().Sub(record.Time(verdict.GetTime()))
		if age >= 0 && age < verdictTTL {
			return features{decided: true, Features: probe.Features{
				ConditionalCopy: verdict.GetConditionalCopy(), MultipartCopy: verdict.GetMultipartCopy(),
			}}, nil
		}
	}
	report, err := probe.Light(ctx, s.o.Store, "")
	if err != nil {
		return features{}, err
	}
	for _, check := range report.Checks {
		if check.Unknown {
			return features{}, fmt.Errorf("probe %s: %w", check.Name, check.Err)
		}
		switch {
		case errors.Is(check.Err, object.ErrDenied), object.IsPassing(check.Err):
			s.o.Log.Warn("the object store refuses a check: its features are unknown",
				zap.String("check", check.Name), zap.Error(check.Err))
		case !check.OK:
			s.o.Log.Warn("the object store lacks an optional feature",
				zap.String("check", check.Name), zap.String("detail", check.Detail))
		}
	}
	return s.featuresOf(ctx, report), nil
}

// featuresOf returns the features of a probe's report, and stores a verdict when all are
// known.
func (s *Store) featuresOf(ctx context.Context, report probe.Report) features {
	f := features{Features: report.Features(), unknown: report.UnknownCopy(), decided: report.Decided(), at: time.Now()}
	if f.decided {
		s.remember(ctx, f.Features)
	}
	return f
}

// remember puts the verdict.
func (s *Store) remember(ctx context.Context, f probe.Features) {
	value := record.Encode(&storagev1.StoreVerdict{
		Format: record.Format, Time: record.Nanos(s.o.Now()), About: s.o.Fingerprint,
		ConditionalCopy: f.ConditionalCopy, MultipartCopy: f.MultipartCopy,
	})
	if _, err := s.o.KV.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(keys.Verdict(s.o.Alias), value)}}); err != nil {
		s.o.Log.Warn("the verdict on the object store is not saved: the next start probes again", zap.Error(err))
	}
}

// checkReadable returns nil when the store is readable, else an ErrUnavailable.
func (s *Store) checkReadable() error {
	if isClosed(s.ready) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Errorf("%w: store %s is not identified since this replica started: %w",
		object.ErrUnavailable, s.o.Alias, s.last)
}

// checkOpen returns nil when the store is open.
func (s *Store) checkOpen() error {
	if isClosed(s.opened) {
		return nil
	}
	if err := s.checkReadable(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == nil { // it was opened meanwhile
		return nil
	}
	return fmt.Errorf("store %s takes no writes before its probe succeeds: %w", s.o.Alias, s.last)
}

// recordWrite records the result of a write.
func (s *Store) recordWrite(info object.Info, err error) (object.Info, error) {
	switch {
	case err == nil:
		s.writes.Passed()
	case errors.Is(err, object.ErrFull), errors.Is(err, object.ErrDenied):
		s.writes.Failed(err)
	}
	return info, err
}

// Put implements [object.Store].
func (s *Store) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	if err := s.checkOpen(); err != nil {
		return object.Info{}, err
	}
	return s.recordWrite(s.o.Store.Put(ctx, key, body))
}

// Create implements [object.Store].
func (s *Store) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	if err := s.checkOpen(); err != nil {
		return object.Info{}, err
	}
	return s.recordWrite(s.o.Store.Create(ctx, key, body))
}

// Get implements [object.Store].
func (s *Store) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object.Info, error) {
	if err := s.checkReadable(); err != nil {
		return nil, object.Info{}, err
	}
	return s.o.Store.Get(ctx, key, offset, length)
}

// Head implements [object.Store].
func (s *Store) Head(ctx context.Context, key string) (object.Info, error) {
	if err := s.checkReadable(); err != nil {
		return object.Info{}, err
	}
	return s.o.Store.Head(ctx, key)
}

// List implements [object.Store].
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[object.Info, error] {
	if err := s.checkReadable(); err != nil {
		return func(yield func(object.Info, error) bool) { yield(object.Info{}, err) }
	}
	return s.o.Store.List(ctx, prefix)
}

// Delete implements [object.Store].
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	err := s.checkReadable()
	if err == nil {
		return s.o.Store.Delete(ctx, keys...)
	}
	errs := make([]error, len(keys))
	for i, key := range keys {
		errs[i] = &object.DeleteError{Key: key, Err: err}
	}
	return errors.Join(errs...)
}

// Copy implements [object.Store].
func (s *Store) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if err := s.checkOpen(); err != nil {
		return object.Info{}, err
	}
	return s.recordWrite(s.o.Store.Copy(ctx, r))
}

// AbortUploads implements [object.Store].
func (s *Store) AbortUploads(ctx context.Context, prefix string, before time.Time) (int, error) {
	if err := s.checkReadable(); err != nil {
		return 0, err
	}
	return s.o.Store.AbortUploads(ctx, prefix, before)
}

// OldestUpload implements [object.Store].
func (s *Store) OldestUpload(ctx context.Context, prefix string) (time.Time, error) {
	if err := s.checkReadable(); err != nil {
		return time.Time{}, err
	}
	return s.o.Store.OldestUpload(ctx, prefix)
}

// Now implements [object.Store].
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	if err := s.checkReadable(); err != nil {
		return time.Time{}, err
	}
	return s.o.Store.Now(ctx)
}
