package robustness

import (
	"strings"
	"testing"
	"time"
)

// at makes an event of the name n from one millisecond to another; to 0: never
// answered.
func at(from, to int, k kind, tag string) event {
	e := event{
		Kind:   k,
		Name:   "n",
		Tag:    tag,
		Call:   moment(from) * moment(time.Millisecond),
		Return: moment(to) * moment(time.Millisecond),
	}
	if to == 0 {
		e.Return = forever
	}
	return e
}

func maybe(e event) event {
	e.Maybe = true
	return e
}

// Each history that is broken has one mistake in it that a cluster could make.
func TestLinearizable(t *testing.T) {
	create := func(from, to int, tag string) []event {
		return []event{at(from, to, begun, tag), at(from, to, committed, tag)}
	}
	lost := func(from int, tag string) []event { // no answer
		return []event{maybe(at(from, 0, begun, tag)), at(from, 0, ended, tag)}
	}
	failed := func(from, to int, tag string) []event {
		return []event{maybe(at(from, to, begun, tag)), at(from, to, givenUp, tag)}
	}
	history := func(parts ...[]event) (all []event) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	one := func(e event) []event { return []event{e} }
	for _, tc := range []struct {
		name    string
		history []event
		want    verdict
	}{
		{"create, get, drop, get", history(create(1, 2, "a"), one(at(3, 4, seenSnapshot, "a")), one(at(5, 6, dropped, "a")),
			one(at(7, 8, seenFree, ""))), fine},
		{"an acknowledged snapshot is lost", history(create(1, 2, "a"), one(at(3, 4, seenFree, ""))), broken},
		{"a stale read: dropped, and still seen", history(create(1, 2, "a"), one(at(3, 4, dropped, "a")), one(at(5, 6,
			seenSnapshot, "a"))), broken},
		{"a stale list", history(create(1, 2, "a"), one(at(3, 4, seenNone, ""))), broken},
		{"a read beside a drop may see either", history(create(1, 2, "a"), one(at(3, 9, dropped, "a")), one(at(4, 5,
			seenSnapshot, "a")), one(at(6, 7, seenFree, ""))), fine},
		{"but not back and forth", history(create(1, 2, "a"), one(at(3, 9, dropped, "a")), one(at(4, 5, seenFree, "")),
			one(at(6, 7, seenSnapshot, "a"))), broken},
		{"two creates of one name", history(create(1, 2, "a"), create(3, 4, "b")), broken},
		{"two creates at once, one refused", history(create(1, 9, "a"), one(at(2, 3, seenTaken, ""))), fine},
		{"refused while it is free", history(one(at(1, 2, seenTaken, "")), create(3, 4, "a")), broken},
		{
			"refused by a create that failed", history(failed(1, 9, "a"), one(at(2, 3, seenTaken, "")), create(10, 11, "b")),
			fine,
		},
		{"no answer, and it happened", history(lost(1, "a"), one(at(5, 6, seenFree, "")), one(at(7, 8, seenPending, "a")),
			one(at(9, 10, seenSnapshot, "a"))), fine},
		{"no answer, and it did not", history(lost(1, "a"), create(5, 6, "b"), one(at(7, 8, seenSnapshot, "b"))), fine},
		{"no answer, and it happened twice", history(lost(1, "a"), one(at(5, 6, seenSnapshot, "a")), one(at(7, 8, dropped,
			"a")), one(at(9, 10, seenSnapshot, "a"))), broken},
		{"it failed, and it appears", history(failed(1, 2, "a"), one(at(5, 6, seenSnapshot, "a"))), broken},
		{"a drop without an answer", history(create(1, 2, "a"), one(maybe(at(3, 0, dropped, ""))), one(at(4, 5, seenSnapshot,
			"a")), one(at(6, 7, seenFree, ""))), fine},
		{"a drop without an answer takes one snapshot", history(create(1, 2, "a"), one(maybe(at(3, 0, dropped, ""))),
			one(at(4, 5, seenFree, "")), create(6, 7, "b"), one(at(8, 9, seenFree, ""))), broken},
		{"two drops of one snapshot", history(create(1, 2, "a"), one(at(3, 5, dropped, "a")), one(at(3, 6, dropped, "a")),
			one(at(7, 8, seenFree, ""))), fine},
		{"a drop that says there was none", history(create(1, 2, "a"), one(at(3, 4, seenFree, ""))), broken},
		{"another snapshot is seen", history(create(1, 2, "a"), one(at(3, 4, seenSnapshot, "b"))), broken},
		{"a snapshot is seen pending after its commit", history(create(1, 2, "a"), one(at(3, 4, seenPending, "a"))), broken},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, text := linearizable(tc.history, 10*time.Second)
			if got != tc.want || (got == broken) != strings.Contains(strings.Join(text, ""), "n is not linearizable") {
				t.Errorf("got %v: %v; want %v", got, text, tc.want)
			}
		})
	}
	// Another name is another register.
	other := at(3, 4, seenFree, "")
	other.Name = "m"
	if got, text := linearizable(append(create(1, 2, "a"), other), 10*time.Second); got != fine {
		t.Errorf("two names: %v", text)
	}
}
