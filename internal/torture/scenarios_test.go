//go:build torture && linux

package torture

import (
	"context"
	"math/rand/v2"
	"regexp"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/testing/etcdcluster"
	"github.com/snapshotd/snapshotd/internal/testing/s3fault"
)

// scenario is one kind of harm.
type scenario struct {
	name    string
	quick   bool     // it is part of a quick run
	quota   int64    // bytes of etcd; 0: the default
	planned []string // the faults that must fire
	// storeFails says that what snapshotd reads from the S3 server may fail or be
	// altered, so that it may refuse to delete what it cannot judge.
	storeFails bool
	// harm does the harm once and takes it back, whatever comes of it. It ends
	// soon after the context. What had its effect it counts. Kinds of harm take
	// turns, by the round, so that none is left out by chance.
	harm func(ctx context.Context, t *traffic, chance *rand.Rand)
}

// The faults, as they are counted.
const (
	killsLeader   = "leader killed"
	killsReplica  = "replica killed"
	killsAll      = "all killed"
	freezesLeader = "leader frozen"
	cutsLeader    = "leader cut off"
	cutsReplica   = "replica cut off"
	killsMember   = "etcd leader killed"
	pausesMember  = "etcd leader paused"
	losesMember   = "member lost"
	losesQuorum   = "quorum lost"
	fills         = "etcd full"
	downs         = "reset"
	slows         = "slow"
	throttles     = "503"
	loses         = "answer lost"
	corrupts      = "corrupt"
	truncates     = "truncated"
	lies          = "200 that is none"
)

// fullQuota is how many bytes etcd has where it is filled: the least with which
// the traffic of a scenario does not fill it alone.
const fullQuota = 24 << 20

var scenarios = []scenario{
	{name: "leader-kill", quick: true, planned: []string{killsLeader}, harm: killLeader},
	{name: "leader-freeze", quick: true, planned: []string{freezesLeader}, harm: freezeLeader},
	{name: "s3-lost", quick: true, planned: []string{loses}, harm: answersLost},
	{name: "replica-kill", planned: []string{killsReplica, killsAll}, harm: killReplicas},
	{name: "link-cut", planned: []string{cutsLeader, cutsReplica}, harm: cutLinks},
	{name: "etcd-kill", planned: []string{killsMember}, harm: killEtcdLeader},
	{name: "etcd-pause", planned: []string{pausesMember}, harm: pauseEtcdLeader},
	{name: "etcd-lost", planned: []string{losesMember, losesQuorum}, harm: loseMembers},
	{name: "etcd-full", quota: fullQuota, planned: []string{fills}, harm: fillEtcd},
	{name: "s3-down", storeFails: true, planned: []string{downs}, harm: storeDown},
	{name: "s3-slow", storeFails: true, planned: []string{slows, throttles}, harm: storeSlow},
	{name: "s3-corrupt", storeFails: true, planned: []string{corrupts, truncates, lies}, harm: bodiesCorrupt},
	{name: "all-at-once", planned: []string{killsLeader, freezesLeader, killsMember, loses}, harm: allAtOnce},
}

// killLeader kills the replica that leads, and starts it again once another leads.
func killLeader(ctx context.Context, t *traffic, chance *rand.Rand) {
	p := t.leads(ctx)
	if p == nil {
		return
	}
	p.kill()
	if t.leads(ctx, p) != nil {
		t.fire(killsLeader, 1)
	}
	_ = wait(ctx, milliseconds(chance, 500))
	p.start(ctx)
	t.serves(context.WithoutCancel(ctx), p)
}

// freezeLeader stops the replica that leads until another leads, which is longer
// than its lease, and has it go on as if nothing had been.
func freezeLeader(ctx context.Context, t *traffic, chance *rand.Rand) {
	p := t.leads(ctx)
	if p == nil {
		return
	}
	p.freeze()
	if t.leads(ctx, p) != nil {
		t.fire(freezesLeader, 1)
		_ = wait(ctx, milliseconds(chance, 1500))
	}
	p.thaw()
}

// killReplicas kills any replica and starts it again, or all of them at once.
func killReplicas(ctx context.Context, t *traffic, chance *rand.Rand) {
	all := t.round%3 == 2
	victims := t.replicas[:]
	if i := chance.IntN(replicas); !all {
		victims = t.replicas[i : i+1]
	}
	for _, p := range victims {
		p.kill()
	}
	_ = wait(ctx, milliseconds(chance, 800))
	for _, p := range victims {
		p.start(ctx)
	}
	for _, p := range victims {
		t.serves(context.WithoutCancel(ctx), p)
	}
	if all {
		t.fire(killsAll, 1)
	} else {
		t.fire(killsReplica, 1)
	}
}

// cutLinks takes etcd from the replica that leads until another leads, or from any
// for a while. The bucket it can still reach.
func cutLinks(ctx context.Context, t *traffic, chance *rand.Rand) {
	p := t.replicas[chance.IntN(replicas)]
	leader := t.round%2 == 0
	if leader {
		if p = t.leads(ctx); p == nil {
			return
		}
	}
	n := p.cut()
	switch {
	case !leader:
		_ = wait(ctx, time.Second+milliseconds(chance, 2000))
		if n > 0 {
			t.fire(cutsReplica, 1)
		}
	case t.leads(ctx, p) != nil:
		t.fire(cutsLeader, 1)
		_ = wait(ctx, milliseconds(chance, 1500))
	}
	p.heal()
}

// killEtcdLeader kills the member of etcd that leads, and starts it again once
// another leads.
func killEtcdLeader(ctx context.Context, t *traffic, chance *rand.Rand) {
	i := t.etcd.Leader(t.tb) //nolint:contextcheck // it ends with the test
	t.etcd.Kill(i)
	if t.etcd.Leader(t.tb) != i { //nolint:contextcheck // it ends with the test
		t.fire(killsMember, 1)
	}
	_ = wait(ctx, milliseconds(chance, 1000))
	t.etcd.Restart(t.tb, i) //nolint:contextcheck // it ends with the test
}

// pauseEtcdLeader stops the member of etcd that leads until another leads.
func pauseEtcdLeader(ctx context.Context, t *traffic, chance *rand.Rand) {
	i := t.etcd.Leader(t.tb) //nolint:contextcheck // it ends with the test
	t.etcd.Pause(i)
	if t.etcd.Leader(t.tb) != i { //nolint:contextcheck // it ends with the test
		t.fire(pausesMember, 1)
	}
	_ = wait(ctx, milliseconds(chance, 2000))
	t.etcd.Resume(i)
}

// loseMembers kills one member of etcd, or two of the three, and starts them again
// after a while.
func loseMembers(ctx context.Context, t *traffic, chance *rand.Rand) {
	first, two := chance.IntN(etcdcluster.Members), t.round%2 == 1
	second := (first + 1) % etcdcluster.Members
	before := t.unanswered()
	t.etcd.Kill(first)
	if two {
		t.etcd.Kill(second)
	}
	_ = wait(ctx, time.Second+milliseconds(chance, 3000))
	switch {
	case !two:
		t.fire(losesMember, 1)
	case t.await(ctx, func(context.Context) bool { return t.unanswered() > before }): // the clients have felt it
		t.fire(losesQuorum, 1)
	}
	if two {
		// Neither serves without the other, so that the first is not waited for.
		t.etcd.RestartAll(t.tb, first, second) //nolint:contextcheck // it ends with the test
		return
	}
	t.etcd.Restart(t.tb, first) //nolint:contextcheck // it ends with the test
}

// unanswered is how many attempts have had no answer so far.
func (t *traffic) unanswered() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for what, count := range t.errors {
		if strings.HasPrefix(what, "Unavailable") || strings.HasPrefix(what, "DeadlineExceeded") {
			n += count
		}
	}
	return n
}

// fillEtcd writes until etcd takes no more, leaves it so for a while, and makes
// room as an operator would: what fills it goes, then compact, defragment, disarm.
func fillEtcd(ctx context.Context, t *traffic, chance *rand.Rand) {
	within, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	before := t.refusedFull()
	full, err := t.etcd.Fill(within)
	if err != nil {
		t.tb.Errorf("fill etcd: %v", err)
		return
	}
	if full {
		_ = wait(ctx, time.Second+milliseconds(chance, 3000))
		if t.refusedFull() > before {
			t.fire(fills, 1)
		}
	}
	if err := t.etcd.MakeRoom(within); err != nil {
		t.tb.Errorf("make room in etcd: %v", err)
	}
}

// refusedFull is how often clients were told that etcd is full.
func (t *traffic) refusedFull() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.errors["ResourceExhausted STORE_FULL"]
}

// plan has the S3 server fail for a while, and counts what fired.
func plan(ctx context.Context, t *traffic, what string, d time.Duration, rules ...s3fault.Rule) {
	t.proxy.Plan(rules...)
	_ = wait(ctx, d)
	t.fire(what, t.proxy.Fired())
	t.proxy.Plan()
}

// pick returns one of a list.
func pick[T any](chance *rand.Rand, list ...T) T { return list[chance.IntN(len(list))] }

// storeDown has the S3 server gone for a while: every connection is reset.
func storeDown(ctx context.Context, t *traffic, chance *rand.Rand) {
	plan(ctx, t, downs, 500*time.Millisecond+milliseconds(chance, 2500), s3fault.Rule{Times: -1, Action: s3fault.Reset()})
}

// storeSlow has the S3 server answer late, or with 503.
func storeSlow(ctx context.Context, t *traffic, chance *rand.Rand) {
	d := 500*time.Millisecond + milliseconds(chance, 2000)
	if t.round%2 == 0 {
		plan(ctx, t, slows, d, s3fault.Rule{Times: -1, Action: s3fault.Slow(milliseconds(chance, 700))})
		return
	}
	plan(ctx, t, throttles, d, s3fault.Rule{Times: -1, Action: s3fault.Status(503, "SlowDown")})
}

// answersLost has the S3 server carry out what it is asked for, and loses the
// answers of some, or carries it out twice.
func answersLost(ctx context.Context, t *traffic, chance *rand.Rand) {
	var rules []s3fault.Rule
	for _, op := range []s3fault.Op{s3fault.PutObject, s3fault.CopyObject, s3fault.DeleteObjects, s3fault.DeleteObject} {
		rules = append(rules, s3fault.Rule{Op: op, Skip: chance.IntN(3), Times: 1 + chance.IntN(4), Action: pick(chance, s3fault.Lost(), s3fault.Lost(), s3fault.Duplicate())})
	}
	plan(ctx, t, loses, time.Second, rules...)
}

// bodiesCorrupt has the S3 server's answers arrive with a bit inverted, in part, or
// as a success that is none.
func bodiesCorrupt(ctx context.Context, t *traffic, chance *rand.Rand) {
	some := func(op s3fault.Op, a s3fault.Action) s3fault.Rule {
		return s3fault.Rule{Op: op, Skip: chance.IntN(3), Times: 1 + chance.IntN(4), Action: a}
	}
	switch t.round % 3 {
	case 0:
		// One answer about each kind of object: what is read anew must not be harmed
		// again, for what is other bytes twice counts as altered.
		var rules []s3fault.Rule
		for _, name := range []string{"metadata.json", "refs.avro", "manifest-0.avro"} {
			rules = append(rules, s3fault.Rule{Op: s3fault.GetObject, Key: regexp.MustCompile(regexp.QuoteMeta(name) + "$"), Skip: chance.IntN(3), Action: s3fault.Corrupt()})
		}
		plan(ctx, t, corrupts, time.Second, rules...)
	case 1:
		plan(ctx, t, truncates, time.Second, some(s3fault.GetObject, pick(chance, s3fault.Truncate(), s3fault.Short())), some(s3fault.ListObjectsV2, s3fault.Truncate()))
	default:
		plan(ctx, t, lies, time.Second, some(s3fault.CopyObject, pick(chance, s3fault.Empty200(), s3fault.HTML200(), s3fault.ErrorIn200("InternalError"))),
			some(s3fault.DeleteObjects, pick(chance, s3fault.HTML200(), s3fault.ErrorIn200("InternalError"))))
	}
}

// allAtOnce does one harm while the S3 server loses answers.
func allAtOnce(ctx context.Context, t *traffic, chance *rand.Rand) {
	t.proxy.Plan(
		s3fault.Rule{Op: s3fault.PutObject, Times: 3, Action: s3fault.Lost()},
		s3fault.Rule{Op: s3fault.CopyObject, Times: 5, Action: s3fault.Lost()},
		s3fault.Rule{Op: s3fault.DeleteObjects, Times: 3, Action: s3fault.Lost()},
	)
	switch t.round % 3 {
	case 0:
		killLeader(ctx, t, chance)
	case 1:
		freezeLeader(ctx, t, chance)
	default:
		killEtcdLeader(ctx, t, chance)
	}
	t.fire(loses, t.proxy.Fired())
	t.proxy.Plan()
}

// milliseconds is a time span by chance, of so many at most.
func milliseconds(chance *rand.Rand, most int) time.Duration {
	return time.Duration(chance.IntN(most)) * time.Millisecond
}
