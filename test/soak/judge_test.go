package main

import (
	"math/rand/v2"
	"strings"
	"testing"
)

// course returns the values of a number of rounds, with a new series after each
// life rounds.
func course(rounds, life int, value func(round int) float64) []point {
	var points []point
	for round := range rounds {
		points = append(points, point{series: "r" + string(rune('A'+round/life)), round: round, value: value(round)})
	}
	return points
}

func TestJudge(t *testing.T) {
	counts := bound{what: "count", slope: 0.2, rise: 3, format: number}
	heap := bound{what: "heap", slope: 4 << 10, rise: 1 << 20, format: kib}
	chance := rand.New(rand.NewPCG(1, 2))
	noise := func(size float64) float64 { return (chance.Float64()*2 - 1) * size }
	for _, tt := range []struct {
		name   string
		bound  bound
		points []point
		want   string
	}{
		{"no rounds", counts, nil, "inconclusive"},
		{"four rounds", counts, course(4, 10, func(int) float64 { return 7 }), "inconclusive"},
		{
			"many processes of one round each", counts, course(30, 1, func(r int) float64 { return float64(r) }),
			"inconclusive",
		},
		{"a constant", counts, course(20, 20, func(int) float64 { return 7 }), "pass"},
		{"one more or less", counts, course(20, 20, func(r int) float64 { return float64(7 + r*r%3) }), "pass"},
		{"one outlier", counts, course(20, 20, func(r int) float64 {
			if r == 18 {
				return 300
			}
			return 7
		}), "pass"},
		{
			"one process differs from the next", counts, course(40, 10, func(r int) float64 { return float64(7 + r/10*50) }),
			"pass",
		},
		{"the first round of each process differs", counts, course(40, 10, func(r int) float64 {
			if r%10 == 0 {
				return 1
			}
			return 50
		}), "pass"},
		{"one in a round", counts, course(8, 8, func(r int) float64 { return float64(7 + r) }), "MISS"},
		{
			"one in a round, one more or less", counts, course(20, 20, func(r int) float64 { return float64(7 + r + r*r%3) }),
			"MISS",
		},
		{"one in a round, short lives", counts, course(40, 8, func(r int) float64 { return float64(7 + r%8) }), "MISS"},
		{"one in four rounds", counts, course(40, 40, func(r int) float64 { return float64(7 + r/4) }), "MISS"},
		{"a step that stays", counts, course(20, 20, func(r int) float64 { return float64(7 + r/13*10) }), "MISS"},
		{"a noisy heap", heap, course(30, 30, func(int) float64 { return 20<<20 + noise(40<<10) }), "pass"},
		{"a heap that shrinks", heap, course(30, 30, func(r int) float64 { return 20<<20 - float64(r<<14) }), "pass"},
		{"10 KB in a round", heap, course(20, 20, func(r int) float64 { return 20<<20 + float64(r*10_000) }), "MISS"},
		{"10 KB in a round and noise", heap, course(30, 30, func(r int) float64 {
			return 20<<20 + float64(r*10_000) +
				noise(40<<10)
		}), "MISS"},
		{"10 KB in a round and noise, short lives", heap, course(60, 12, func(r int) float64 {
			return 20<<20 +
				float64(r%12*10_000) + noise(20<<10)
		}), "MISS"},
		{"a few rounds of loud noise that rises", heap, course(7, 7, func(r int) float64 {
			return 20<<20 + []float64{0, 0, 200, 40, 260, 20, 240}[r]*(1<<10)
		}), "inconclusive"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := judge(tt.bound, tt.points); got.Verdict() != tt.want {
				t.Errorf("verdict %s, want %s: %+v", got.Verdict(), tt.want, got)
			}
		})
	}
}

func TestMaximum(t *testing.T) {
	if got := maximum("x", 2, number, nil); got.Verdict() != "inconclusive" {
		t.Errorf("without rounds: %+v", got)
	}
	if got := maximum(
		"x",
		2,
		number,
		course(3, 3, func(int) float64 { return 2 }),
	); got.Verdict() != "pass" ||
		got.Got != "2" {
		t.Errorf("a value at the limit: %+v", got)
	}
	if got := maximum(
		"x",
		2,
		number,
		course(3, 3, func(r int) float64 { return float64(r * 2) }),
	); got.Verdict() != "MISS" ||
		got.Got != "4" {
		t.Errorf("a value above the limit: %+v", got)
	}
}

func TestStacks(t *testing.T) {
	const text = `goroutine profile: total 9
3 @ 0x1 0x2
#	0x1	net/http.(*persistConn).readLoop+0x1	/go/net/http/transport.go:1

4 @ 0x3 0x4
#	0x3	runtime.gopark+0xce	/go/runtime/proc.go:1
#	0x4	example.com/a.(*B).Run.func1+0x35	/a.go:2

2 @ 0x3 0x5
#	0x3	runtime.gopark+0x11	/go/runtime/proc.go:1
#	0x5	example.com/a.(*B).Run.func1+0x77	/a.go:9
`
	got, err := stacks([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	const run = "example.com/a.(*B).Run.func1 < runtime.gopark"
	if len(got) != 2 || got[run] != 6 {
		t.Errorf("stacks: %v", got)
	}
	if grown := grownStacks(
		map[string]int{run: 4},
		got,
	); len(grown) != 2 ||
		!strings.HasPrefix(grown[0], "3 more of net/http.") {
		t.Errorf("grown: %q", grown)
	}
	if n := removeStacks(got, "net/http.(*persistConn).readLoop"); n != 3 || len(got) != 1 {
		t.Errorf("removed %d readers of pooled connections, want 3; rest %v", n, got)
	}
	if _, err := stacks([]byte("x @ 0x1\n")); err == nil {
		t.Error("an invalid count is accepted")
	}
}
