#!/usr/bin/env bash
# Runs a share of each of the long tests, short enough for every change. Each has
# seeds of its own, which it prints. A run of processes that came to no verdict,
# for a fault did not have its effect in time, is made once more: on a busy machine
# that says nothing. One that found something is not.
set -euo pipefail
cd "$(dirname "$0")/.."

step() {
	local name=$1 began=$SECONDS
	shift
	printf '\n--- %s: %s\n' "$name" "$*"
	"$@"
	printf -- '--- %s: passed after %d s\n' "$name" $((SECONDS - began))
}

# twice runs a target, and once more if it came to no verdict.
twice() {
	local verdict=$1 log status=0
	shift
	log=$(mktemp)
	"$@" 2>&1 | tee "$log" || status=$?
	if [ $status -ne 0 ] && grep -q "$verdict" "$log"; then
		printf -- '--- no verdict, once more\n'
		status=0
		"$@" || status=$?
	fi
	rm -f "$log"
	return $status
}

step simulation make sim SIM_FOR=30s
step 'crash sweep' make crash QUICK=1
step robustness twice '^robustness: INCONCLUSIVE' make robustness QUICK=1
step soak make soak QUICK=1 SOAK_TIME=90s
step mutants make mutants
# Of the parsers of what comes from outside; all seeds run with the tests.
step fuzzing make fuzz FUZZTIME=3s FUZZ='internal/(store/manifest|segment|catalog/layout|store/keys|store/epoch)'
