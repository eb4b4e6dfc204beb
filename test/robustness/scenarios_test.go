//go:build robustness && linux

package robustness

import (
	"context"
	"maps"
	"math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/test/etcdcluster"
	"github.com/snapshotd/snapshotd/test/s3fault"
)

// scenario is one kind of harm.
type scenario struct {
	name    string
	quick   bool     // it is part of a quick run
	quota   int64    // bytes of etcd; 0: the default
	planned []string // the faults that must fire
	// storeFails is set when reads from the S3 server may fail or be altered, so that
	// snapshotd may refuse to delete.
	storeFails bool
	// wrongHeads is set when HEAD may report an object as missing or changed, so that a
	// create or a restore may be refused.
	wrongHeads bool
	// overtakes says that what replicas hear from etcd passes a proxy that can have
	// progress overtake events, so that a list may be stale.
	overtakes bool
	// own says that the scenario has a client and a collection of its own.
	own bool
	// harm does the harm once and takes it back, whatever comes of it. It ends
	// soon after the context. What had its effect it counts. Kinds of harm take
	// turns, by the round, so that none is left out by chance. It is done again until
	// all that is planned has fired.
	harm func(ctx context.Context, t *traffic, chance *rand.Rand)
}

// The faults, as they are counted.
const (
	killsLeader   = "leader killed"
	killsReplica  = "replica killed"
	killsAll      = "all killed"
	freezesLeader = "leader frozen"
	freezesWorker = "worker frozen"
	cutsLeader    = "leader cut off"
	cutsReplica   = "replica cut off"
	mutes         = "not heard by etcd"
	deafens       = "not hearing etcd"
	lags          = "late by 2 s"
	flaps         = "flapping"
	revokes       = "lease revoked"
	closes        = "watches closed"
	compacts      = "compacted past watches"
	overtakes     = "events overtaken"
	overtakesCut  = "overtaken and cut"
	startsOver    = "started over"
	killsMember   = "etcd leader killed"
	pausesMember  = "etcd leader paused"
	losesMember   = "member lost"
	losesQuorum   = "quorum lost"
	losesLong     = "quorum lost for long"
	fills         = "etcd full"
	downs         = "reset"
	refuses       = "refused"
	fails         = "500, 502, 504"
	expires       = "400 RequestTimeout"
	slows         = "slow"
	throttles     = "503"
	postpones     = "503 with Retry-After"
	hangs         = "hung"
	hangsAfter    = "hung once carried out"
	hangsInBody   = "hung in the body"
	loses         = "answer lost"
	corrupts      = "corrupt"
	truncates     = "truncated"
	lengthens     = "too long"
	false200      = "false 200"
	wrongHeads    = "wrong HEAD"
	listLacks     = "list lacks keys"
	listStrays    = "list with strays"
	losesPart     = "answer about parts lost"
	falsePart     = "false 200 about parts"
	replaces      = "source replaced"
	deletes       = "source deleted"
)

// longLoss is for how long there is no quorum once in a run.
const longLoss = 30 * time.Second

// fullQuota is how many bytes etcd has where it is filled: the least with which
// the traffic of a scenario does not fill it alone.
const fullQuota = 24 << 20

var scenarios = []scenario{
	{name: "leader-kill", quick: true, planned: []string{killsLeader}, harm: killLeader},
	{name: "leader-freeze", quick: true, planned: []string{freezesLeader}, harm: freezeLeader},
	{name: "s3-lost", quick: true, planned: []string{loses}, harm: answersLost},
	{name: "replica-kill", planned: []string{killsReplica, killsAll}, harm: killReplicas},
	{name: "worker-freeze", own: true, planned: []string{freezesWorker}, harm: freezeWorker},
	{name: "link-cut", planned: []string{cutsLeader, cutsReplica}, harm: cutLinks},
	{name: "link-sick", planned: []string{mutes, deafens, lags, flaps}, harm: hinderLinks},
	{name: "etcd-kill", planned: []string{killsMember}, harm: killEtcdLeader},
	{name: "etcd-pause", planned: []string{pausesMember}, harm: pauseEtcdLeader},
	{name: "etcd-lost", planned: []string{losesMember, losesQuorum, losesLong}, harm: loseMembers},
	{name: "etcd-full", quota: fullQuota, planned: []string{fills}, harm: fillEtcd},
	{name: "etcd-hostile", planned: []string{revokes, closes, compacts}, harm: offendEtcd},
	{
		name:      "etcd-overtaken",
		overtakes: true,
		planned:   []string{overtakes, overtakesCut, startsOver},
		harm:      overtakeEvents,
	},
	{name: "s3-down", storeFails: true, planned: []string{downs, refuses, fails, expires}, harm: storeDown},
	{name: "s3-slow", storeFails: true, planned: []string{slows, throttles, postpones}, harm: storeSlow},
	{name: "s3-hang", storeFails: true, planned: []string{hangs, hangsAfter, hangsInBody}, harm: storeHangs},
	{
		name:       "s3-corrupt",
		storeFails: true,
		planned:    []string{corrupts, truncates, lengthens, false200},
		harm:       bodiesCorrupt,
	},
	{
		name:       "s3-metadata",
		storeFails: true,
		wrongHeads: true,
		planned:    []string{wrongHeads, listLacks, listStrays},
		harm:       wrongMetadata,
	},
	{name: "s3-parts", own: true, planned: []string{losesPart, falsePart}, harm: partsFail},
	{name: "source-harmed", own: true, planned: []string{replaces, deletes}, harm: harmSources},
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

// ownSnapshot returns a snapshot of the scenario's own collection, nil when none was
// acknowledged: the first that was, or a new one of a new segment with these files.
func (t *traffic) ownSnapshot(ctx context.Context, another bool, sizes ...int) *snapshot {
	if t.ownFirst != nil && !another {
		return t.ownFirst
	}
	var bodies [][]byte
	for _, n := range sizes {
		bodies = append(bodies, t.own.bytes(n))
	}
	s, err := t.own.writeAs(ctx, bodies)
	if err != nil {
		t.tb.Errorf("write a segment: %v", err)
		return nil
	}
	if t.own.register(ctx, s) != success {
		return nil
	}
	made := t.own.createNamed(ctx, t.own.tag())
	if made == nil || made.content == nil {
		return nil
	}
	t.ownFirst = made
	return made
}

// ownRestore begins a restore of a snapshot, and returns its job: 0 when none was
// admitted for all that is known.
func (t *traffic) ownRestore(ctx context.Context, s *snapshot) int64 {
	if s == nil {
		return 0
	}
	return t.own.restoreAs(ctx, s.id, "own_"+t.own.tag()[1:])
}

// ends waits for the end of a restore.
func (t *traffic) ends(ctx context.Context, job int64) (end *snapshotdv1.RestoreJob) {
	n := 0
	t.await(ctx, func(ctx context.Context) bool {
		n++
		resp, err := t.replicas[n%replicas].client.Snapshots.GetRestoreState(
			ctx,
			&snapshotdv1.GetRestoreStateRequest{JobId: job},
		)
		if err != nil {
			return false
		}
		switch resp.GetJob().GetState() {
		case snapshotdv1.RestoreJob_STATE_COMPLETED,
			snapshotdv1.RestoreJob_STATE_FAILED,
			snapshotdv1.RestoreJob_STATE_CANCELED:
			end = resp.GetJob()
			return true
		default:
			return false
		}
	})
	return end
}

// freezeWorker stops a replica in the middle of a restore, until its task is
// another's, or until that other has ended it, and has it go on with its copies as
// if nothing had been.
func freezeWorker(ctx context.Context, t *traffic, chance *rand.Rand) {
	s := t.ownSnapshot(ctx, false, 100, 200, 300, 400, 500, 600, 700, 800)
	// So that the middle lasts.
	t.proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Times: -1, Action: s3fault.Slow(time.Second)})
	defer t.proxy.Plan()
	job := t.ownRestore(ctx, s)
	if job == 0 {
		return
	}
	first, p := t.assigned(ctx, job, 0)
	if p == nil {
		return
	}
	p.freeze()
	defer p.thaw()
	second, other := t.assigned(ctx, job, first)
	if other == nil || second == first {
		return
	}
	if t.round%2 == 0 && t.ends(ctx, job) == nil {
		return
	}
	_ = wait(ctx, milliseconds(chance, 1000))
	t.fire(freezesWorker, 1)
}

// assigned waits until a task of a restore is given to a worker that is not this
// one, and returns that worker's id and its replica: nil when it takes too long, or
// the restore has ended.
func (t *traffic) assigned(ctx context.Context, job, not int64) (worker int64, p *replica) {
	began := not != 0
	t.await(ctx, func(ctx context.Context) bool {
		assignments, _, err := t.etcd.Read(ctx, root+keys.AssignedPrefix)
		if err != nil {
			return false
		}
		for key := range assignments {
			of, _, err := keys.LastTwo(key)
			if err != nil || of != job {
				continue
			}
			if worker, err = keys.AssignedTo(strings.TrimPrefix(key, root)); err != nil || worker == not {
				continue
			}
			records, _, err := t.etcd.Read(ctx, root+keys.Worker(worker))
			if err != nil {
				return false
			}
			for _, r := range t.replicas {
				if strings.Contains(records[root+keys.Worker(worker)], r.name) {
					p = r
					return true
				}
			}
		}
		// Its tasks are there from its preparation to its end.
		tasks, _, err := t.etcd.Read(ctx, root+keys.TaskPrefix(job))
		ended := err == nil && began && len(tasks) == 0
		began = began || len(tasks) > 0
		return ended
	})
	return worker, p
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

// hinderLinks has what a replica sends to etcd, or what etcd sends to it, not arrive,
// arrive two seconds later, or break off again and again.
func hinderLinks(ctx context.Context, t *traffic, chance *rand.Rand) {
	p := t.leads(ctx)
	if p == nil {
		return
	}
	unheard := func(what string, way direction) {
		p.hinder(way, always)
		other := t.leads(ctx, p)
		if held := p.heal(); other != nil && held > 0 {
			t.fire(what, 1)
		}
	}
	switch t.round % 4 {
	case 0:
		unheard(mutes, there)
	case 1:
		unheard(deafens, back)
	case 2:
		p.hinder(there, time.Second)
		p.hinder(back, time.Second)
		_ = wait(ctx, 4*time.Second+milliseconds(chance, 2000))
		if p.heal() > 0 {
			t.fire(lags, 1)
		}
	default:
		broken := 0
		for range 10 {
			broken += p.cut()
			_ = wait(ctx, milliseconds(chance, 200))
			p.heal()
			_ = wait(ctx, milliseconds(chance, 600))
		}
		if broken > len(p.links) { // those that were made meanwhile as well
			t.fire(flaps, 1)
		}
	}
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
// after a while: once two after a long one, in which nothing may be deleted.
func loseMembers(ctx context.Context, t *traffic, chance *rand.Rand) {
	first := chance.IntN(etcdcluster.Members)
	t.etcd.Kill(first)
	if t.round%2 == 1 {
		_ = wait(ctx, time.Second+milliseconds(chance, 3000))
		t.fire(losesMember, 1)
		t.etcd.Restart(t.tb, first) //nolint:contextcheck // it ends with the test
		return
	}
	second := (first + 1 + chance.IntN(etcdcluster.Members-1)) % etcdcluster.Members
	t.etcd.Kill(second)
	before := t.unanswered()
	long := !t.firedAll([]string{losesLong})
	if long {
		_ = wait(ctx, longLoss/3) // the leader has ended, and what it had begun
		from := t.now()
		_ = wait(ctx, longLoss*2/3)
		if n := t.deletedSince(from); n > 0 {
			t.wrong("%d objects were deleted while there was no quorum", n)
		}
	} else {
		_ = wait(ctx, time.Second+milliseconds(chance, 3000))
	}
	// The clients have felt it.
	if felt := t.await(
		ctx,
		func(context.Context) bool { return t.unanswered() > before },
	); felt && long &&
		ctx.Err() == nil {
		t.fire(losesLong, 1)
	} else if felt {
		t.fire(losesQuorum, 1)
	}
	// Neither serves without the other, so that the first is not waited for.
	t.etcd.RestartAll(t.tb, first, second) //nolint:contextcheck // it ends with the test
}

// deletedSince is how many deletes have reached the S3 server since a moment, but
// for notes and probes.
func (e *env) deletedSince(from moment) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, d := range e.deletions {
		if d.at > from && !strings.HasPrefix(d.key, epochPrefix) && !strings.HasPrefix(d.key, probePrefix) {
			n++
		}
	}
	return n
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

// offendEtcd does to etcd what others that may use it can: it ends the lease of the
// leader, breaks all watches, or compacts past those of a replica that is cut off.
func offendEtcd(ctx context.Context, t *traffic, chance *rand.Rand) {
	switch t.round % 3 {
	case 0:
		lease, err := t.etcd.Revoke(ctx, root+keys.Leader)
		if err != nil || lease == 0 {
			return
		}
		if t.await(ctx, func(ctx context.Context) bool {
			now, err := t.etcd.Lease(ctx, root+keys.Leader)
			return err == nil && now != 0 && now != lease
		}) {
			t.fire(revokes, 1)
		}
	case 1:
		n := 0
		for _, p := range t.replicas {
			n += p.cut()
			p.heal()
		}
		if n > 0 {
			t.fire(closes, 1)
		}
	default:
		p := t.replicas[chance.IntN(replicas)]
		before := p.logged(tooOld)
		p.cut()
		defer p.heal()
		_, from, err := t.etcd.Read(ctx, root+keys.IDs)
		if err != nil || !t.await(ctx, func(ctx context.Context) bool {
			_, now, err := t.etcd.Read(ctx, root+keys.IDs)
			return err == nil && now > from+20 && t.etcd.Compact(ctx, now) == nil
		}) {
			return
		}
		p.heal()
		if t.await(ctx, func(context.Context) bool { return p.logged(tooOld) > before }) {
			t.fire(compacts, 1)
		}
	}
}

// overtakeEvents has etcd say that watches have seen everything before it sends them
// the last of it, and break some of them in between.
func overtakeEvents(ctx context.Context, t *traffic, chance *rand.Rand) {
	logged := func() (n int) {
		for _, p := range t.replicas {
			n += p.logged(outOfOrder)
		}
		return n
	}
	count := func() (events, cuts int64) {
		for _, p := range t.members {
			e, c := p.Overtaken()
			events, cuts = events+e, cuts+c
		}
		return events, cuts
	}
	said := logged()
	eventsBefore, cutsBefore := count()
	for _, p := range t.members {
		p.Overtake(10+chance.IntN(20), 1+chance.IntN(2))
	}
	_ = wait(ctx, time.Second+milliseconds(chance, 1000))
	for _, p := range t.members {
		p.Overtake(0, 0)
	}
	events, cuts := count()
	t.fire(overtakes, int(events-eventsBefore))
	t.fire(overtakesCut, int(cuts-cutsBefore))
	if t.await(ctx, func(context.Context) bool { return logged() > said }) {
		t.fire(startsOver, logged()-said)
	}
}

// outOfOrder is what a replica logs whose watch was shown an event too late.
const outOfOrder = "watch out of order"

// tooOld is what a replica logs whose watch is of a revision that was compacted.
const tooOld = "revision compacted"

// refusedFull counts answers that etcd is full.
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

// storeDown has the S3 server gone for a while: connections are reset or refused, or
// all that it answers is an error of its own.
func storeDown(ctx context.Context, t *traffic, chance *rand.Rand) {
	d := 500*time.Millisecond + milliseconds(chance, 2500)
	switch t.round % 4 {
	case 0:
		plan(ctx, t, downs, d, s3fault.Rule{Times: -1, Action: s3fault.Reset()})
	case 1:
		n := 0
		for _, p := range t.replicas {
			n += p.store.refuse()
		}
		_ = wait(ctx, d)
		for _, p := range t.replicas {
			p.store.heal()
		}
		t.fire(refuses, n)
	case 2:
		a := pick(
			chance,
			s3fault.Status(500, "InternalError"),
			s3fault.Status(502, "BadGateway"),
			s3fault.Status(504, "GatewayTimeout"),
		)
		plan(ctx, t, fails, d, s3fault.Rule{Times: -1, Action: a})
	default:
		plan(ctx, t, expires, d, s3fault.Rule{Times: -1, Action: s3fault.Status(400, "RequestTimeout")})
	}
}

// storeSlow has the S3 server answer late, or with 503, with or without a word on
// when to come again.
func storeSlow(ctx context.Context, t *traffic, chance *rand.Rand) {
	d := 500*time.Millisecond + milliseconds(chance, 2000)
	switch t.round % 3 {
	case 0:
		plan(ctx, t, slows, d, s3fault.Rule{Times: -1, Action: s3fault.Slow(milliseconds(chance, 700))})
	case 1:
		plan(ctx, t, throttles, d, s3fault.Rule{Times: -1, Action: s3fault.Status(503, "SlowDown")})
	default:
		plan(
			ctx,
			t,
			postpones,
			d,
			s3fault.Rule{Times: -1, Action: s3fault.StatusWith(503, "SlowDown", http.Header{"Retry-After": {"1"}})},
		)
	}
}

// storeHangs has the S3 server not answer some of what it is asked: before it does
// it, after that, or from the middle of the body on.
func storeHangs(ctx context.Context, t *traffic, chance *rand.Rand) {
	some := func(a s3fault.Action, ops ...s3fault.Op) (rules []s3fault.Rule) {
		for _, op := range ops {
			rules = append(rules, s3fault.Rule{Op: op, Skip: chance.IntN(3), Times: 1 + chance.IntN(2), Action: a})
		}
		return rules
	}
	d := time.Second + milliseconds(chance, 1000)
	switch t.round % 3 {
	case 0:
		plan(
			ctx,
			t,
			hangs,
			d,
			some(
				s3fault.Hang(),
				s3fault.PutObject,
				s3fault.GetObject,
				s3fault.CopyObject,
				s3fault.ListObjectsV2,
				s3fault.DeleteObjects,
			)...)
	case 1:
		plan(
			ctx,
			t,
			hangsAfter,
			d,
			some(s3fault.HangAfter(), s3fault.PutObject, s3fault.CopyObject, s3fault.DeleteObjects)...)
	default:
		plan(
			ctx,
			t,
			hangsInBody,
			d,
			some(s3fault.HangInBody(), s3fault.GetObject, s3fault.CopyObject, s3fault.ListObjectsV2)...)
	}
}

// answersLost has the S3 server carry out what it is asked for, and loses the
// answers of some, or carries it out twice.
func answersLost(ctx context.Context, t *traffic, chance *rand.Rand) {
	var rules []s3fault.Rule
	for _, op := range []s3fault.Op{s3fault.PutObject, s3fault.CopyObject, s3fault.DeleteObjects, s3fault.DeleteObject} {
		rules = append(
			rules,
			s3fault.Rule{
				Op:     op,
				Skip:   chance.IntN(3),
				Times:  1 + chance.IntN(4),
				Action: pick(chance, s3fault.Lost(), s3fault.Lost(), s3fault.Duplicate()),
			},
		)
	}
	plan(ctx, t, loses, time.Second, rules...)
}

// notDone is a success that is an error, of what was not carried out. The others are
// of what was.
var notDone = s3fault.Status(200, "InternalError")

// bodiesCorrupt has the S3 server's answers arrive with a bit inverted, in part, with
// something added, or as a success that is none.
func bodiesCorrupt(ctx context.Context, t *traffic, chance *rand.Rand) {
	some := func(op s3fault.Op, a s3fault.Action) s3fault.Rule {
		return s3fault.Rule{Op: op, Skip: chance.IntN(3), Times: 1 + chance.IntN(4), Action: a}
	}
	// One answer about each kind of object: a repeated read must not be harmed, since two
	// wrong answers count as an altered object.
	once := func(a s3fault.Action) (rules []s3fault.Rule) {
		for _, name := range []string{"metadata.json", "refs.avro", "manifest-0.avro"} {
			rules = append(
				rules,
				s3fault.Rule{
					Op:     s3fault.GetObject,
					Key:    regexp.MustCompile(regexp.QuoteMeta(name) + "$"),
					Skip:   chance.IntN(3),
					Action: a,
				},
			)
		}
		return rules
	}
	switch t.round % 4 {
	case 0:
		plan(ctx, t, corrupts, time.Second, once(s3fault.Corrupt())...)
	case 1:
		plan(ctx, t, lengthens, time.Second, once(s3fault.Long())...)
	case 2:
		plan(
			ctx,
			t,
			truncates,
			time.Second,
			some(s3fault.GetObject, pick(chance, s3fault.Truncate(), s3fault.Short())),
			some(s3fault.ListObjectsV2, s3fault.Truncate()),
		)
	default:
		plan(
			ctx,
			t,
			false200,
			time.Second,
			some(s3fault.CopyObject, pick(chance, s3fault.Empty200(), s3fault.HTML200(), s3fault.Short(), notDone)),
			some(s3fault.DeleteObjects, pick(chance, s3fault.HTML200(), s3fault.ErrorIn200("InternalError"), notDone)),
		)
	}
}

// wrongMetadata makes the S3 server report objects as missing or as longer, omit objects
// from listings, list them twice, or list objects outside the prefix.
func wrongMetadata(ctx context.Context, t *traffic, chance *rand.Rand) {
	switch t.round % 3 {
	case 0:
		plan(
			ctx,
			t,
			wrongHeads,
			time.Second,
			s3fault.Rule{Op: s3fault.HeadObject, Times: -1, Action: pick(chance, s3fault.WrongLength(), s3fault.NotFound())},
		)
	case 1:
		plan(ctx, t, listLacks, time.Second, s3fault.Rule{Op: s3fault.ListObjectsV2, Times: -1, Action: s3fault.ListMisses()})
	default:
		plan(
			ctx,
			t,
			listStrays,
			time.Second,
			s3fault.Rule{
				Op:     s3fault.ListObjectsV2,
				Times:  4,
				Action: pick(chance, s3fault.ListDuplicates(), s3fault.ListForeign("zzz/stray")),
			},
		)
	}
}

// partsSize is the size of an object that is copied in parts.
const partsSize = 257 << 20

// partsFail has answers about copies in parts be lost, or be a success that is none.
// Each takes the room of an object once more, so that none comes twice.
func partsFail(ctx context.Context, t *traffic, chance *rand.Rand) {
	s := t.ownSnapshot(ctx, false, partsSize)
	if s == nil {
		return
	}
	what := losesPart
	if t.firedAll([]string{losesPart}) {
		what = falsePart
	}
	if t.firedAll([]string{what}) {
		_ = wait(ctx, time.Second)
		return
	}
	var rules []s3fault.Rule
	for _, op := range []s3fault.Op{
		s3fault.CreateMultipartUpload, s3fault.UploadPartCopy,
		s3fault.CompleteMultipartUpload,
	} {
		a := s3fault.Lost()
		if what == falsePart {
			a = pick(chance, notDone, s3fault.ErrorIn200("SlowDown"), s3fault.Short(), s3fault.Empty200())
		}
		rules = append(rules, s3fault.Rule{Op: op, Action: a})
	}
	t.proxy.Plan(rules...)
	defer t.proxy.Plan()
	job := t.ownRestore(ctx, s)
	if job == 0 {
		return
	}
	if end := t.ends(ctx, job); end.GetState() == snapshotdv1.RestoreJob_STATE_COMPLETED {
		t.fire(what, t.proxy.Fired())
	}
}

// harmSources replaces or deletes, past snapshotd, a file of a snapshot while a
// restore is about to copy it.
func harmSources(ctx context.Context, t *traffic, _ *rand.Rand) {
	s := t.ownSnapshot(ctx, true, 1000, 2000, 3000)
	if s == nil {
		return
	}
	for _, id := range slices.Sorted(maps.Keys(s.content)) { // none of it in the next one
		if i := slices.Index(t.own.alive, id); i >= 0 {
			t.own.alive = slices.Delete(t.own.alive, i, i+1)
			t.own.dropSegment(ctx, id)
		}
	}
	var once sync.Once
	var harmed atomic.Bool
	t.proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Times: -1, Action: s3fault.CallBefore(func(r *http.Request) {
		_, key, _ := strings.Cut(strings.TrimPrefix(r.Header.Get("X-Amz-Copy-Source"), "/"), "/")
		if t.holds(s, key) {
			once.Do(func() {
				t.harm(ctx, key, t.round%2 == 1)
				harmed.Store(true)
			})
		}
	})})
	defer t.proxy.Plan()
	job := t.ownRestore(ctx, s)
	if job == 0 {
		return
	}
	end := t.ends(ctx, job)
	switch {
	case end.GetState() != snapshotdv1.RestoreJob_STATE_FAILED, !harmed.Load():
	case end.GetReason() == sourceAltered:
		t.fire(replaces, 1)
	case end.GetReason() == sourceMissing:
		t.fire(deletes, 1)
	}
}

// holds reports whether a file belongs to a snapshot and is not harmed.
func (t *traffic) holds(s *snapshot, key string) (held bool) {
	t.l.note(func(l *ledger) {
		for _, list := range s.content {
			held = held || slices.Contains(list, key)
		}
		held = held && !l.harmed[key]
	})
	return held
}

// harm deletes a file past snapshotd, or puts other bytes in its place.
func (t *traffic) harm(ctx context.Context, key string, remove bool) {
	t.l.note(func(l *ledger) { l.harmed[key] = true })
	var err error
	if remove {
		_, err = t.store.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &t.bucket, Key: &key})
	} else {
		_, err = t.store.PutObject(
			ctx,
			&s3.PutObjectInput{Bucket: &t.bucket, Key: &key, Body: strings.NewReader("other bytes")},
		)
	}
	if err != nil {
		t.wrong("harm %s: %v", key, err)
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
