package sim

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"hash"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/cluster"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/test/virtual"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "run this seed alone, or begin with it when -seeds is given; 0: the fixed seeds")
	seedsFlag = flag.Int("seeds", 0, "run so many seeds")
	forFlag   = flag.Duration("for", 3*time.Minute, "begin no seed after so long")
	traceFlag = flag.String("trace", "", "write the whole trace of the last seed to this file")
)

// How much is run.
const (
	fixedSeeds = 8   // run with all other tests
	enough     = 500 // of which all together meet everything that there is
	lastSteps  = 50  // of a trace, printed when a run fails
	maxSteps   = 60_000
	maxFlying  = 6
	opTimeout  = 2 * time.Minute
)

// One processor: see the package comment.
func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(1)
	os.Exit(m.Run())
}

func TestSim(t *testing.T) {
	reached, ran := runSeeds(t, run)
	t.Log(reached.String())
	if ran >= enough {
		for what, count := range reached.counts() {
			if count == 0 {
				t.Errorf("there never was: %s", what)
			}
		}
	}
}

// runSeeds makes the requested runs within the requested time.
func runSeeds(t *testing.T, run func(t *testing.T, seed uint64, reached *reach) *sim) (reached reach, ran int) {
	t.Helper()
	first, n := uint64(1), fixedSeeds
	switch {
	case *seedFlag != 0 && *seedsFlag != 0:
		first, n = *seedFlag, *seedsFlag
	case *seedFlag != 0:
		first, n = *seedFlag, 1
	case *seedsFlag != 0:
		n = *seedsFlag
	case testing.Short():
		n = 3
	}
	began := time.Now()
	failed, steps := []uint64{}, 0
	for seed := first; seed < first+uint64(n) && time.Since(began) < *forFlag && len(failed) < 5; seed++ {
		s := run(t, seed, &reached)
		ran++
		steps += s.step
		if s.failure != "" {
			failed = append(failed, seed)
			t.Error(s.failure)
		}
	}
	t.Logf("%d seeds from %d on, %d steps, in %v", ran, first, steps, time.Since(began).Round(time.Millisecond))
	if len(failed) > 0 {
		t.Errorf("seeds that failed: %v", failed)
	}
	return reached, ran
}

// TestReplay runs seeds twice, and demands the same trace.
func TestReplay(t *testing.T) {
	first, n := uint64(1), 4
	if *seedsFlag != 0 {
		n = min(*seedsFlag, 20)
	}
	if *seedFlag != 0 {
		first, n = *seedFlag, max(1, min(*seedsFlag, 20))
	}
	if *seedsFlag == 0 && *seedFlag == 0 && (testing.Short() || !exact) {
		n = 1
	}
	same := 0
	for seed := first; seed < first+uint64(n); seed++ {
		a, b := run(t, seed, nil), run(t, seed, nil)
		if a.sum() == b.sum() && a.failure == b.failure {
			same++
			continue
		}
		i := 0
		for i < min(len(a.trace), len(b.trace)) && a.trace[i] == b.trace[i] {
			i++
		}
		text := fmt.Sprintf(
			"seed %d takes another course from step %d on, of %d and %d:\n",
			seed,
			i,
			len(a.trace),
			len(b.trace),
		)
		for _, s := range []*sim{a, b} {
			text += strings.Join(s.trace[max(0, i-5):min(i+3, len(s.trace))], "\n") + "\n--\n"
		}
		t.Log(text)
	}
	t.Logf("%d of %d seeds replay", same, n)
	if same < n && exact {
		t.Errorf("%d of %d seeds do not replay", n-same, n)
	}
}

// failed is the end of a run with a violation.
type failed string

// profile is the kind of run of a seed.
type profile struct {
	replicas, ops                    int
	fail, after, crash, freeze, hold float64 // chance in a step
	late                             float64 // chance that a call without a caller lands, else it is lost
	patience                         float64 // chance that time passes though calls are waiting
	haste                            float64 // chance that something is asked for
	longest                          time.Duration
	fifo                             bool // calls are chosen in the order of their arrival
	share                            float64
	drop                             bool // collections are dropped often

	spoil   float64       // chance that a read is answered with what is not so, or is cut in its middle
	rot     float64       // chance in a step that an object of a snapshot cannot be read for a while
	foreign float64       // chance of a foreign write where a create is about to write
	clocks  time.Duration // how far a replica's clock may be off, and that of the object store
	jump    float64       // chance in a step that a clock jumps
	grace   time.Duration // of orphans
	batch   int           // keys of a scan per batch
	focus   []string      // chores of which half of those come that are asked for
	slow    string        // calls whose names begin with it are held up, mostly; empty: none
	weak    string        // calls whose names begin with it fail often; empty: none
}

// slowly are kinds of calls: when those of one kind take long, the others overtake them.
var slowly = []string{
	"object create ",
	"object get ",
	"object list ",
	"object delete ",
	copyName,
	"txn",
	"scan ",
	"send ",
	"grant ",
}

func (s *sim) newProfile() profile {
	pick := func(list ...float64) float64 { return list[s.rng.IntN(len(list))] }
	p := profile{
		replicas: 2 + s.rng.IntN(2),
		ops:      40 + s.rng.IntN(60),
		fail: pick(
			0,
			0.002,
			0.01,
			0.04,
		),
		after:    pick(0, 0.002, 0.01, 0.04),
		crash:    pick(0, 0.0005, 0.002),
		freeze:   pick(0, 0.001, 0.004),
		hold:     pick(0, 0.01, 0.05),
		late:     pick(0.2, 0.5, 0.9),
		patience: pick(0.002, 0.01, 0.03),
		haste:    pick(0.02, 0.1, 0.3),
		longest:  []time.Duration{time.Second, 30 * time.Second, 3 * time.Minute}[s.rng.IntN(3)],
		fifo:     s.rng.IntN(4) == 0,
		share:    pick(0.5, 1),
		drop:     s.rng.IntN(3) == 0,
		spoil:    pick(0, 0, 0.01, 0.05),
		rot:      pick(0, 0, 0.002),
		foreign:  pick(0, 0, 0, 0.05),
		clocks:   []time.Duration{0, 0, time.Minute, 4 * time.Minute, time.Hour}[s.rng.IntN(5)],
		jump:     pick(0, 0.001),
		grace:    []time.Duration{time.Second, 10 * time.Minute}[s.rng.IntN(2)],
		batch:    []int{1, 3, 500}[s.rng.IntN(3)],
	}
	if s.rng.IntN(3) == 0 {
		p.slow = slowly[s.rng.IntN(len(slowly))]
	}
	if s.rng.IntN(4) == 0 {
		p.weak = slowly[s.rng.IntN(len(slowly))]
	}
	if s.rng.IntN(3) > 0 {
		f := focuses[s.rng.IntN(len(focuses))]
		p.focus, p.slow, p.weak, p.spoil = f.chores, cmp.Or(f.slow, p.slow), cmp.Or(f.weak, p.weak), max(f.spoil, p.spoil)
	}
	return p
}

// sim is one run.
type sim struct {
	seed    uint64
	rng     *rand.Rand // of the scheduler, and what it asks for
	profile profile
	gate    *gate
	kv      *metamemory.Store
	objects object.Store
	cluster cluster.Cluster
	oracle  *oracle
	work    *work
	members []*member // by index; nil: it is down
	lives   []int
	all     []*member
	began   time.Time
	clock   clock // of the object store
	calmed  bool  // the end has begun

	step    int
	trace   []string
	hash    hash.Hash
	failure string
	reached *reach
}

func (s *sim) sum() string { return hex.EncodeToString(s.hash.Sum(nil)) }

// wrong ends the run. Only the scheduler's goroutine may call it.
func (s *sim) wrong(format string, args ...any) { panic(failed(fmt.Sprintf(format, args...))) }

func (s *sim) must(err error) {
	if err != nil {
		s.wrong("%v", err)
	}
}

func (s *sim) chance(p float64) bool { return s.rng.Float64() < p }

// note adds a step to the trace.
func (s *sim) note(format string, args ...any) {
	line := fmt.Sprintf("%5d %12v ", s.step, time.Since(s.began)) + fmt.Sprintf(format, args...)
	s.step++
	s.trace = append(s.trace, line)
	s.hash.Write([]byte(line))
}

// run makes one run. Nothing is collected by the runtime meanwhile: it would
// interrupt goroutines at other places each time.
func run(t *testing.T, seed uint64, reached *reach) *sim {
	t.Helper()
	return runAs(t, seed, reached, func(s *sim) {
		s.play()
		s.finish()
	})
}

// runAs is run of a course of its own.
func runAs(t *testing.T, seed uint64, reached *reach, course func(s *sim)) *sim {
	t.Helper()
	if reached == nil {
		reached = &reach{}
	}
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	s := &sim{
		seed:    seed,
		rng:     rand.New(rand.NewPCG(seed, 7)),
		hash:    sha256.New(),
		reached: reached,
	} //nolint:gosec // a simulation
	virtual.Test(t, func(*testing.T) {
		seedRuntime(seed)
		s.began = time.Now()
		ctx, cancel := context.WithCancel(never)
		var watching sync.WaitGroup
		defer func() {
			r := recover()
			s.tearDown()
			cancel()
			watching.Wait()
			if text, ok := r.(failed); ok {
				s.fails(string(text))
			} else if r != nil {
				s.fails(fmt.Sprintf("panic: %v\n%s", r, debug.Stack()))
			}
		}()
		s.setUp()
		watching.Go(func() { s.oracle.watch(ctx) })
		course(s)
	})
	if *traceFlag != "" {
		if err := os.WriteFile(*traceFlag, []byte(strings.Join(s.trace, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *sim) fails(text string) {
	s.failure = fmt.Sprintf("seed %d: %s\nthe last steps:\n%s\nto replay it: make sim SEED=%d\n", s.seed, text,
		strings.Join(s.trace[max(0, len(s.trace)-lastSteps):], "\n"), s.seed)
}

func (s *sim) setUp() {
	s.profile = s.newProfile()
	s.kv = metamemory.New(metamemory.Options{Now: time.Now})
	s.setClock(&s.clock, s.profile.clocks/2)
	s.objects = objectmemory.New(objectmemory.Options{Now: s.clock.now})
	s.gate = newGate()
	random := newSeeded(s.seed, "set-up")
	var err error
	s.cluster, err = cluster.Open(
		never,
		s.kv,
		cluster.Options{NameScope: cluster.ScopeCluster, Release: "sim", Now: time.Now, Rand: random},
	)
	s.must(err)
	s.oracle = newOracle(s)
	s.work = newWork(s)
	s.must(identity.Check(never, s.kv, s.objects, "default", s.cluster.ID, random))
	s.members, s.lives = make([]*member, s.profile.replicas), make([]int, s.profile.replicas)
	s.note("profile %+v", s.profile)
	for i := range s.members {
		s.start(i, false)
		virtual.Wait()
	}
}

// tearDown ends all goroutines.
func (s *sim) tearDown() {
	s.gate.close()
	for _, m := range s.all {
		m.stop()
	}
	if s.work != nil {
		s.work.stop()
		s.work.flying.Wait()
	}
	for _, m := range s.all {
		<-m.ended
	}
}

// play runs the workload, in the order and with the faults that the seed chooses.
func (s *sim) play() {
	for s.work.left > 0 || s.work.inFlight() > 0 {
		if s.step > maxSteps {
			s.wrong("there is no end: %d calls of clients are under way: %v", s.work.inFlight(), s.work.underWay())
		}
		s.turn()
	}
}

// eligible returns the calls that may be chosen now, in the order of names.
func (s *sim) eligible() []*call {
	now := time.Now()
	return slices.DeleteFunc(s.gate.list(), func(c *call) bool { return c.m.frozen && !c.m.dead || c.held.After(now) })
}

// settle waits until no goroutine runs, and judges the result.
func (s *sim) settle() {
	virtual.Wait()
	s.gate.setStep(s.step)
	seedRuntime(s.seed<<32 + uint64(s.step)) // so that one choice more or less is forgotten
	s.oracle.observe()
}

func (s *sim) turn() {
	s.settle()
	list := s.eligible()
	p := &s.profile
	switch {
	case s.work.left > 0 && s.work.inFlight() < maxFlying && len(s.calm()) > 0 && s.chance(p.haste):
		s.work.begin()
	case s.chance(p.crash) && len(s.up()) > 0:
		s.crash(s.up()[s.rng.IntN(len(s.up()))])
	case s.chance(p.freeze) && len(s.calm()) > 0:
		m := s.calm()[s.rng.IntN(len(s.calm()))]
		m.frozen = true
		s.reached.frozen++
		s.note("freeze %v", m)
	case s.chance(0.002), len(s.calm()) == 0 && s.chance(0.2):
		s.revive()
	case len(list) == 0:
		s.pass(p.longest)
	case s.chance(p.rot):
		s.rot()
	case s.chance(p.jump):
		s.jump()
	case s.chance(p.patience):
		s.pass(time.Duration(1 + s.rng.Int64N(int64(p.longest))))
	default:
		c := list[s.rng.IntN(len(list))]
		if p.fifo {
			c = slices.MinFunc(list, func(a, b *call) int { return a.step - b.step })
		}
		s.decide(c)
	}
}

// revive thaws a replica, or restarts one that is down.
func (s *sim) revive() {
	i := s.rng.IntN(len(s.members))
	switch m := s.members[i]; {
	case m == nil:
		s.note("start %v", s.start(i, false))
	case m.frozen:
		m.frozen = false
		s.note("thaw %v", m)
	}
}

// decide decides a call.
func (s *sim) decide(c *call) {
	p := &s.profile
	switch {
	case c.gone || c.m.dead: // it lands late, or never
		s.gate.take(c)
		if !s.chance(p.late) {
			s.note("%v %s: lost", c.m, c.name)
			s.leaveUpload(c)
			return
		}
		s.reached.late++
		s.note("%v %s: late: %s", c.m, c.name, c.do(never))
	case s.chance(p.hold), p.slow != "" && c.held.IsZero() && strings.HasPrefix(c.name, p.slow) && s.chance(0.7):
		c.held = time.Now().Add(time.Duration(1 + s.rng.Int64N(int64(p.longest))))
		s.note("%v %s: held", c.m, c.name)
	case c.spoil != nil && s.chance(p.spoil):
		s.gate.take(c)
		s.reached.spoiled++
		s.note("%v %s: %s", c.m, c.name, c.spoil(never, s.rng))
		c.done <- nil
	case s.chance(p.fail), p.weak != "" && strings.HasPrefix(c.name, p.weak) && s.chance(0.2):
		s.gate.take(c)
		s.reached.before++
		s.note("%v %s: fails", c.m, c.name)
		s.leaveUpload(c)
		c.done <- fmt.Errorf("%s: %w: it failed before", c.name, c.lost)
	case s.chance(p.after):
		s.gate.take(c)
		s.reached.after++
		s.note("%v %s: %s, and fails", c.m, c.name, c.do(never))
		c.done <- fmt.Errorf("%s: %w: it failed after", c.name, c.lost)
	default:
		if key, creates := strings.CutPrefix(c.name, "object create snapshots/"); creates && s.chance(p.foreign) {
			s.overtake("snapshots/" + strings.Fields(key)[0])
		}
		s.deliver(c)
	}
}

func (s *sim) deliver(c *call) {
	s.gate.take(c)
	s.note("%v %s: %s", c.m, c.name, c.do(never))
	c.done <- nil
}

// crash ends a life. Of its calls some take effect before, some later, some never.
func (s *sim) crash(m *member) {
	s.reached.crashed++
	s.note("crash %v", m)
	s.members[m.index] = nil
	for _, c := range s.gate.kill(m) {
		if c.gone {
			continue
		}
		switch {
		case !c.write || s.chance(0.3):
			s.gate.take(c)
			s.leaveUpload(c)
		case s.chance(0.5):
			s.gate.take(c)
			s.note("%v %s: %s, at the last moment", m, c.name, c.do(never))
		default: // it stays, and lands late or never
			c.gone = true
		}
		c.done <- fmt.Errorf("%s: %w: %w", c.name, c.lost, errDead)
	}
	m.stop()
}

// pass lets time pass: at most d, and only until a call waits when none has yet.
func (s *sim) pass(d time.Duration) {
	if len(s.eligible()) > 0 {
		time.Sleep(d)
		s.note("%v pass", d)
		return
	}
	now, until := time.Now(), d
	for _, c := range s.gate.list() { // what was held up is next
		if left := c.held.Sub(now); left > 0 && !c.m.frozen {
			until = min(until, left)
		}
	}
	select {
	case <-s.gate.arrived:
	default:
	}
	timer := time.NewTimer(until)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.gate.arrived:
	}
	s.note("%v pass, of %v", time.Since(now), until)
}

// calmDown ends all faults: what is waiting is answered, what is late lands, and
// all that was stopped goes on.
func (s *sim) calmDown() {
	s.calmed = true
	s.note("the end begins")
	clear(s.oracle.rot)
	for _, m := range s.all {
		m.clock.set(0)
	}
	s.clock.set(0)
	for i, m := range s.members {
		if m == nil {
			s.start(i, false)
			virtual.Wait()
			continue
		}
		m.frozen = false
	}
	for _, c := range s.gate.list() {
		c.held = time.Time{}
	}
}

// rest lets time pass without faults; all that is waiting is answered at once.
func (s *sim) rest(d time.Duration) {
	s.until(d, func() bool { return false })
}

// until is rest until something is so.
func (s *sim) until(d time.Duration, so func() bool) bool {
	end := time.Now().Add(d)
	for {
		s.settle()
		if so() {
			return true
		}
		list := s.eligible()
		switch {
		case len(list) > 0:
			for _, c := range list {
				if c.gone || c.m.dead {
					s.decide(c)
					continue
				}
				s.deliver(c)
			}
		case !time.Now().Before(end):
			return false
		default:
			s.pass(time.Until(end))
		}
		if s.step > 4*maxSteps {
			s.wrong("there is no rest")
		}
	}
}
