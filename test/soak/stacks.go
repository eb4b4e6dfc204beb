package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Functions of the goroutines of a pooled connection to the object store, two each,
// and of a connection for metrics and profiles, up to two.
const (
	pooledReader = "net/http.(*persistConn).readLoop"
	pooledWriter = "net/http.(*persistConn).writeLoop"
	servesHTTP   = "net/http.(*conn).serve"
	readsHTTP    = "net/http.(*connReader).backgroundRead"
)

// stacks parses a text profile of goroutines. It returns the number of goroutines
// per stack, written as its functions from the outermost on.
func stacks(profile []byte) (map[string]int, error) {
	found := map[string]int{}
	n := 0
	var functions []string
	end := func() {
		if n > 0 {
			slices.Reverse(functions)
			found[strings.Join(functions, " < ")] += n
		}
		n, functions = 0, nil
	}
	for line := range strings.Lines(string(profile)) {
		line = strings.TrimSpace(line)
		count, _, begins := strings.Cut(line, " @ ")
		switch {
		case begins && !strings.HasPrefix(line, "#"):
			end()
			var err error
			if n, err = strconv.Atoi(count); err != nil {
				return nil, fmt.Errorf("profile of goroutines: %w", err)
			}
		case strings.HasPrefix(line, "#"):
			if fields := strings.Split(line, "\t"); len(fields) > 2 {
				functions = append(functions, fields[2][:max(strings.LastIndexByte(fields[2], '+'), 0)])
			}
		}
	}
	end()
	return found, nil
}

// removeStacks removes the goroutines with a function on their stack and returns
// their number.
func removeStacks(all map[string]int, function string) (n int) {
	for stack, count := range all {
		if slices.Contains(strings.Split(stack, " < "), function) {
			n += count
			delete(all, stack)
		}
	}
	return n
}

// grownStacks returns the stacks whose number is higher in later than in earlier,
// by growth.
func grownStacks(earlier, later map[string]int) []string {
	type growth struct {
		stack string
		by    int
	}
	var list []growth
	for stack, n := range later {
		if by := n - earlier[stack]; by > 0 {
			list = append(list, growth{stack, by})
		}
	}
	slices.SortFunc(list, func(a, b growth) int {
		return cmp.Or(cmp.Compare(b.by, a.by), strings.Compare(a.stack, b.stack))
	})
	lines := make([]string, len(list))
	for i, g := range list {
		lines[i] = fmt.Sprintf("%d more of %s", g.by, g.stack)
	}
	return lines
}
