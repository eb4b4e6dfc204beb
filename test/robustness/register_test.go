package robustness

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// moment is a time since the scenario began, by the one clock of the harness.
type moment time.Duration

// forever is the return of a call without an answer: its effect may happen at any time
// after the call.
const forever = moment(math.MaxInt64)

func (m moment) String() string {
	if m == forever {
		return "never"
	}
	return time.Duration(m).Round(time.Millisecond).String()
}

// kind is the effect of an event on a name, or its observation.
type kind int

// A create is two events, for the name is taken before the snapshot is there: it
// begins, and it commits or is given up.
const (
	begun        kind = iota + 1 // the name was free, and is taken by a create
	committed                    // the create has made the snapshot
	ended                        // the create of no known outcome has made the snapshot, or nothing
	givenUp                      // the create that failed has let the name go, if it had it
	dropped                      // the snapshot is dropped
	seenFree                     // the name is free
	seenTaken                    // the name is taken
	seenPending                  // a create has it
	seenSnapshot                 // a snapshot has it
	seenNone                     // no snapshot has it; a create may
)

func (k kind) String() string {
	return [...]string{
		"?", "begun", "committed", "ended", "given up", "dropped", "seen free", "seen taken",
		"seen pending", "seen snapshot", "seen no snapshot",
	}[k]
}

// event is a part of a call that is about one name. It took effect at one moment
// between Call and Return.
type event struct {
	Client int
	Kind   kind
	Name   string
	// Tag is the create that it is about: its description, by which a snapshot is
	// known whatever its id. Empty where that is not known: any.
	Tag          string
	Call, Return moment
	// Maybe says that it may have had no effect.
	Maybe bool
	// Repeated says of dropped that another drop of the same snapshot may have
	// succeeded first.
	Repeated bool
}

func (e event) String() string {
	maybe := ""
	if e.Maybe {
		maybe = "?"
	}
	return fmt.Sprintf("%v–%v client %d: %s %v%s %s", e.Call, e.Return, e.Client, e.Name, e.Kind, maybe, e.Tag)
}

// register is the state of a name: free, a create or a snapshot.
type register struct {
	held kind // 0, begun or committed
	tag  string
}

// next returns the possible states of the name after an event; none when the event is
// not possible. It is pure.
func next(r register, e event) []register {
	has := func(k kind) bool { return r.held == k && (e.Tag == "" || r.tag == e.Tag) }
	when := func(possible bool) []register {
		if possible {
			return []register{r}
		}
		return nil
	}
	var free register
	var effect []register
	switch e.Kind {
	case begun:
		if r == free {
			effect = []register{{begun, e.Tag}}
		}
	case committed:
		if has(begun) {
			effect = []register{{committed, r.tag}}
		}
	case ended:
		if has(begun) {
			return []register{{committed, r.tag}, free}
		}
		return []register{r}
	case givenUp:
		if has(begun) {
			return []register{free}
		}
		return []register{r}
	case dropped:
		if has(committed) {
			effect = []register{free}
		} else if e.Repeated {
			return []register{r}
		}
	case seenFree:
		return when(r == free)
	case seenTaken:
		return when(r != free)
	case seenPending:
		return when(has(begun))
	case seenSnapshot:
		return when(has(committed))
	case seenNone:
		return when(r.held != committed)
	}
	if e.Maybe {
		effect = append(effect, r)
	}
	return effect
}

// verdict is the finding of a judge.
type verdict int

const (
	fine verdict = iota
	undecided
	broken
)

// linearizable judges the history of each name: whether there is an order of its
// events, each at a moment between its call and its return, in which each is
// possible. It is undecided when that takes too long. The text describes the names that
// fail.
func linearizable(history []event, patience time.Duration) (worst verdict, text []string) {
	model := (&porcupine.NondeterministicModel{
		Init: func() []any { return []any{register{}} },
		Step: func(state, input, _ any) []any {
			var states []any
			for _, r := range next(state.(register), input.(event)) {
				states = append(states, r)
			}
			return states
		},
	}).ToModel()
	names := map[string][]event{}
	for _, e := range history {
		names[e.Name] = append(names[e.Name], e)
	}
	for name, events := range names {
		slices.SortStableFunc(events, func(a, b event) int { return cmp.Compare(a.Call, b.Call) })
		drops := map[string]int{}
		for _, e := range events {
			if e.Kind == dropped {
				drops[e.Tag]++
			}
		}
		ops := make([]porcupine.Operation, len(events))
		for i, e := range events {
			e.Repeated = e.Kind == dropped && (drops[e.Tag] > 1 || drops[""] > 0)
			ops[i] = porcupine.Operation{ClientId: e.Client, Input: e, Call: int64(e.Call), Return: int64(e.Return)}
		}
		switch result, info := porcupine.CheckOperationsVerbose(model, ops, patience); result {
		case porcupine.Illegal:
			worst = broken
			text = append(text, fmt.Sprintf("the history of %s is not linearizable: %s", name, stuck(events, info)))
		case porcupine.Unknown:
			worst = max(worst, undecided)
			text = append(text, fmt.Sprintf("the history of %s, %d events, could not be judged in %v", name, len(ops), patience))
		case porcupine.Ok:
		}
	}
	slices.Sort(text)
	return worst, text
}

// stuck describes the end of the longest possible order: the first events by their calls
// that have no place in it, and the events before those.
func stuck(events []event, info porcupine.LinearizationInfo) string {
	var longest []int
	for _, part := range info.PartialLinearizations() {
		for _, order := range part {
			if len(order) > len(longest) {
				longest = order
			}
		}
	}
	placed := map[int]bool{}
	for _, i := range longest {
		placed[i] = true
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d events have a place in the longest order;", len(placed), len(events))
	for i := range events {
		if placed[i] {
			continue
		}
		fmt.Fprintf(&b, " the first without is the last of")
		for _, e := range events[max(0, i-15) : i+1] {
			fmt.Fprintf(&b, "\n    %v", e)
		}
		break
	}
	return b.String()
}
