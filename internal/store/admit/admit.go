// Package admit keeps an object store closed until it is known to be the one that
// the cluster uses, and fit for it. So a replica starts, and serves what needs the
// metadata store alone, while an object store does not answer; and it writes and
// deletes nothing in a store before it has seen its identity.
//
// # States
//
//	         identify, record, check              probe
//	closed --------------------------> readable ---------> open
//	   |                                  |
//	   +----------------------------------+--- refused: an error, which ends the process
//
// A closed store answers every call with ErrUnavailable. A readable one reads, lists
// and deletes, for it is known to be the cluster's: a full store is emptied so. It
// refuses writes with the error of the probe, for whether the store keeps what is
// written is not known. An open store stays open. Where the alias is not known the
// probe comes first: there is nothing to read, and the record is a write.
//
// # An attempt
//
//	identify  where the metadata store knows the alias: the identity of the store is
//	          read and compared. Nothing is written before
//	check     what else the caller asks for; last where the alias is not known
//	probe     the store is tried out, unless the metadata store holds a verdict about
//	          the same release and configuration that is younger than a day
//	remember  puts the verdict, when the probe found all that is required
//	record    where the alias is not known: package identity makes an identity, or
//	          reads it, and records it
//
// # Failures
//
//	no answer, of either store, in  the store stays closed; Run tries again. Where the
//	a step but the probe            alias is not known, the error is an ErrUnknown too
//	probe: full, no answer, writes  the store stays readable; Run tries again. No
//	are denied                      verdict is left
//	copies cannot be tried, as for  the store is open; what it can do is not known, and
//	a right that is missing         no verdict is left. Features tries again
//	copies were found not to be     likewise: a store is upgraded, and a gateway
//	safe                            replaced, while the replica runs
//	another store; lacks what is    refused: Attempt and Run return it
//	required
//	denied, misconfigured, damaged  Attempt returns it, and so ends a start; Run, in a
//	                                replica that serves, logs it and tries again
//	remember: no answer             logged; the next start probes again
//	process dies, freezes           nothing is left but objects of the probe, which
//	                                the sweep removes
//
// # Writes that are refused
//
// Also an open store may refuse writes, since it is full or denies them. That is
// logged once and counted until one succeeds; [Store.NoWrites] says it meanwhile.
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

// ErrUnknown means that the cluster does not know the alias yet, so that there is
// nothing that could be served without the store.
var ErrUnknown = errors.New("the cluster does not know this object store yet")

const (
	// verdictFor is how long a verdict spares a probe.
	verdictFor = 24 * time.Hour
	// attemptTimeout bounds an attempt of Run.
	attemptTimeout = time.Minute
	// minWait and maxWait bound the time between attempts of Run.
	minWait = time.Second
	maxWait = 30 * time.Second
	// lookAgain is how long after a try Features makes the next one.
	lookAgain = 10 * time.Second
)

// Options are what a Store needs.
type Options struct {
	Store   object.Store // the one to admit
	Alias   string
	InUse   []string // all aliases of this replica
	KV      meta.KV
	Cluster string // the cluster's id
	// About is the SHA-256 of the release and the configuration of the store. Empty:
	// the store is not probed, and can do all.
	About []byte
	// Check is a further step; nil: none.
	Check func(ctx context.Context) error
	Now   func() time.Time
	Rand  io.Reader
	Log   *zap.Logger
	// Problems gets those of the store. Default: its own.
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
	features found
	last     error // of the last attempt

	trying sync.Mutex // held by the call that tries copies again
}

// found is what a store can do.
type found struct {
	probe.Features

	unknown error     // why it is not known whether copies are safe; nil: it is
	decided bool      // all is known
	at      time.Time // when it was tried; zero: it is remembered, or was not
}

var _ object.Store = (*Store)(nil)

// New returns a Store that is closed.
func New(o Options) *Store {
	if o.Problems == nil {
		o.Problems = lasting.New(o.Now)
	}
	log := o.Log.With(zap.String("store", o.Alias))
	return &Store{
		o: o, ready: make(chan struct{}), opened: make(chan struct{}), last: errors.New("it has not been asked yet"),
		admission: o.Problems.Add(log, "store admission "+o.Alias,
			"the object store is not admitted yet: calls that need it are refused", "everything that needs object store "+o.Alias),
		writes: o.Problems.Add(log, "store writes "+o.Alias,
			"the object store refuses writes; reads, lists and deletes go on", "what has to write to object store "+o.Alias),
	}
}

// Ready returns a channel that is closed once the store is known to be the cluster's,
// so that it can be read.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// NoWrites returns why the store takes no writes, as last seen; nil: it does.
func (s *Store) NoWrites() error {
	if state := s.writes.State(); state.Error != "" {
		return errors.New(state.Error)
	}
	return nil
}

// Features returns what the store can do. It is an ErrUnavailable while the store
// is closed, and the error of the probe while that could not be made.
//
// With again a store that makes no copies of just the version asked for, or of which
// that is not known, is tried once more when the last try was longer ago than
// lookAgain. What is not known then is an error that wraps why.
func (s *Store) Features(ctx context.Context, again bool) (probe.Features, error) {
	if err := s.unwritable(); err != nil {
		return probe.Features{}, err
	}
	if again {
		s.tryAgain(ctx)
	}
	f := s.known()
	return f.Features, f.unknown
}

func (s *Store) known() found {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.features
}

// tryAgain tries copies when that is due.
func (s *Store) tryAgain(ctx context.Context) {
	due := func() bool {
		f := s.known()
		return (!f.decided || !f.ConditionalCopy) && time.Since(f.at) >= lookAgain
	}
	if !due() {
		return
	}
	s.trying.Lock() // others wait for what it finds
	defer s.trying.Unlock()
	if !due() {
		return
	}
	report, err := probe.Copies(ctx, s.o.Store, "")
	if err != nil {
		return // ctx ended: this call has found out nothing
	}
	f := s.foundBy(ctx, report)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.features = f
}

// Pending reports whether an error of Attempt leaves open what the store is: it, or
// the metadata store, did not answer or was full.
func Pending(err error) bool {
	for _, e := range []error{object.ErrUnavailable, object.ErrFull, meta.ErrUnavailable, meta.ErrNoSpace, context.DeadlineExceeded} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Attempt tries once to admit the store, and returns nil when it is readable or open.
// See [Pending] for its errors.
func (s *Store) Attempt(ctx context.Context) error {
	if isClosed(s.opened) {
		return nil
	}
	features, readable, err := s.attempt(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = err
	switch {
	case isClosed(s.opened):
		return nil
	case err == nil:
		s.features = features
		s.admission.Passed()
		s.writes.Passed()
		s.beReady()
		close(s.opened)
		return nil
	case readable && (Pending(err) || errors.Is(err, object.ErrDenied)):
		s.admission.Passed()
		s.writes.Failed(err)
		s.beReady()
		return nil
	}
	if Pending(err) && !errors.Is(err, ErrUnknown) {
		s.admission.Failed(err)
	}
	return fmt.Errorf("object store %s: %w", s.o.Alias, err)
}

// beReady lets reads through. The lock must be held.
func (s *Store) beReady() {
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

// Run tries until the store is open, or ctx ended: then it returns nil. It returns
// the error of an attempt that found another store, or one that is not fit.
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
		case err != nil && !Pending(err) && ctx.Err() == nil: // else Attempt has noted it
			s.admission.Failed(err)
		case err == nil && isClosed(s.opened):
			s.o.Log.Info("the object store is admitted: calls that need it are served", zap.String("store", s.o.Alias))
			return nil
		}
	}
}

// attempt returns what the store can do. It is readable with an error of the probe.
func (s *Store) attempt(ctx context.Context) (features found, readable bool, err error) {
	known, err := identity.Known(ctx, s.o.KV, s.o.Store, s.o.Alias)
	if err != nil {
		return features, false, err
	}
	if known {
		if err := s.check(ctx); err != nil {
			return features, false, err
		}
		features, err = s.fit(ctx)
		return features, true, err
	}
	features, err = s.fit(ctx)
	if err == nil {
		err = identity.Check(ctx, s.o.KV, s.o.Store, s.o.Alias, s.o.Cluster, s.o.Rand, s.o.InUse...)
	}
	if err == nil {
		err = s.check(ctx)
	}
	if err != nil {
		err = fmt.Errorf("%w (%w)", err, ErrUnknown)
	}
	return features, false, err
}

func (s *Store) check(ctx context.Context) error {
	if s.o.Check == nil {
		return nil
	}
	return s.o.Check(ctx)
}

// fit returns what the store can do.
func (s *Store) fit(ctx context.Context) (found, error) {
	if len(s.o.About) == 0 {
		return found{Features: probe.Features{ConditionalCopy: true, MultipartCopy: true}, decided: true}, nil
	}
	return s.find(ctx)
}

// find returns the features that are remembered, or those that a probe finds.
func (s *Store) find(ctx context.Context) (found, error) {
	kv, there, _, err := s.o.KV.Get(ctx, keys.Verdict(s.o.Alias))
	if err != nil {
		return found{}, err
	}
	verdict := &storagev1.StoreVerdict{}
	if there && record.Decode(kv, verdict) == nil && bytes.Equal(verdict.GetAbout(), s.o.About) {
		age := s.o.Now().Sub(record.Time(verdict.GetTime()))
		if age >= 0 && age < verdictFor {
			return found{
				Features: probe.Features{ConditionalCopy: verdict.GetConditionalCopy(), MultipartCopy: verdict.GetMultipartCopy()},
				decided:  true,
			}, nil
		}
	}
	report, err := probe.Light(ctx, s.o.Store, "")
	if err != nil {
		return found{}, err
	}
	for _, check := range report.Checks {
		if check.Unknown {
			return found{}, fmt.Errorf("probe %s: %w", check.Name, check.Err)
		}
		switch {
		case errors.Is(check.Err, object.ErrDenied), object.IsPassing(check.Err):
			s.o.Log.Warn("a check of the object store is refused: what it can do is not known",
				zap.String("check", check.Name), zap.Error(check.Err))
		case !check.OK:
			s.o.Log.Warn("the object store lacks what would be good to have", zap.String("check", check.Name), zap.String("detail", check.Detail))
		}
	}
	return s.foundBy(ctx, report), nil
}

// foundBy is what a probe has found, which is remembered when all is known.
func (s *Store) foundBy(ctx context.Context, report probe.Report) found {
	f := found{Features: report.Features(), unknown: report.UnknownCopy(), decided: report.Decided(), at: time.Now()}
	if f.decided {
		s.remember(ctx, f.Features)
	}
	return f
}

// remember puts the verdict.
func (s *Store) remember(ctx context.Context, features probe.Features) {
	value := record.Encode(&storagev1.StoreVerdict{
		Format: record.Format, Time: record.Nanos(s.o.Now()), About: s.o.About,
		ConditionalCopy: features.ConditionalCopy, MultipartCopy: features.MultipartCopy,
	})
	if _, err := s.o.KV.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(keys.Verdict(s.o.Alias), value)}}); err != nil {
		s.o.Log.Warn("what the probe of the object store found is not remembered: the next start probes again", zap.Error(err))
	}
}

// closed returns nil when the store is readable, else an ErrUnavailable.
func (s *Store) closed() error {
	if isClosed(s.ready) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Errorf("%w: store %s is not known to be the cluster's since this replica started: %w", object.ErrUnavailable, s.o.Alias, s.last)
}

// unwritable returns nil when the store is open.
func (s *Store) unwritable() error {
	if isClosed(s.opened) {
		return nil
	}
	if err := s.closed(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == nil { // it has been opened meanwhile
		return nil
	}
	return fmt.Errorf("store %s takes no writes before it could be tried out: %w", s.o.Alias, s.last)
}

// wrote takes note of what became of a write.
func (s *Store) wrote(info object.Info, err error) (object.Info, error) {
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
	if err := s.unwritable(); err != nil {
		return object.Info{}, err
	}
	return s.wrote(s.o.Store.Put(ctx, key, body))
}

// Create implements [object.Store].
func (s *Store) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	if err := s.unwritable(); err != nil {
		return object.Info{}, err
	}
	return s.wrote(s.o.Store.Create(ctx, key, body))
}

// Get implements [object.Store].
func (s *Store) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object.Info, error) {
	if err := s.closed(); err != nil {
		return nil, object.Info{}, err
	}
	return s.o.Store.Get(ctx, key, offset, length)
}

// Head implements [object.Store].
func (s *Store) Head(ctx context.Context, key string) (object.Info, error) {
	if err := s.closed(); err != nil {
		return object.Info{}, err
	}
	return s.o.Store.Head(ctx, key)
}

// List implements [object.Store].
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[object.Info, error] {
	if err := s.closed(); err != nil {
		return func(yield func(object.Info, error) bool) { yield(object.Info{}, err) }
	}
	return s.o.Store.List(ctx, prefix)
}

// Delete implements [object.Store].
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	err := s.closed()
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
	if err := s.unwritable(); err != nil {
		return object.Info{}, err
	}
	return s.wrote(s.o.Store.Copy(ctx, r))
}

// AbortUploads implements [object.Store].
func (s *Store) AbortUploads(ctx context.Context, prefix string, before time.Time) (int, error) {
	if err := s.closed(); err != nil {
		return 0, err
	}
	return s.o.Store.AbortUploads(ctx, prefix, before)
}

// Now implements [object.Store].
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	if err := s.closed(); err != nil {
		return time.Time{}, err
	}
	return s.o.Store.Now(ctx)
}
