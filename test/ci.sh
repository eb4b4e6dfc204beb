#!/usr/bin/env bash
# Runs each of the long tests in short, and all mutants, as CI does for every change. Each
# run prints its seed. A robustness run that is INCONCLUSIVE is repeated once, because on
# a busy machine a fault may not have its effect in time; one that failed is not.
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
