#!/usr/bin/env bash
# Runs every fuzz test of the module, one after another, for a time each, and exits
# with 1 at the first crasher. Its input is then a file under the package's
# testdata/fuzz, which each later `go test` runs: commit it with the fix.
#
#   test/fuzz.sh 20s          # all
#   test/fuzz.sh 5m Manifest  # those whose package or name matches
#
# Go's build cache keeps the inputs that reached new code; the next run starts with them.
set -euo pipefail
cd "$(dirname "$0")/.."

time=${1:?for how long each, such as 20s}
only=${2:-.}
[[ $time =~ ^([0-9]+)([sm])$ ]] || { echo "$time is no time such as 20s or 5m" >&2; exit 2; }
seconds=${BASH_REMATCH[1]}
[ "${BASH_REMATCH[2]}" = s ] || seconds=$((seconds * 60))

# name and package, a line each
targets=$(grep -rnoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . |
	sed -E 's|^(.*)/[^/]*:[0-9]+:func (Fuzz.*)$|\2 \1|' | sort -k2 -k1 | grep -E "$only") || { echo "no fuzz test matches $only" >&2; exit 2; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "$(wc -l <<<"$targets") fuzz tests, $time each"
while read -r name package; do
	# Building, the seeds, and making what was found small come on top.
	status=0
	timeout -k 10 $((seconds + 240)) ${GO:-go} test -tags short -run '^$' -fuzz "^$name\$" -fuzztime "$time" -fuzzminimizetime 10s -parallel 2 "$package" >"$log" 2>&1 </dev/null || status=$?
	if [ $status -eq 0 ]; then
		printf '%-26s %-34s %s\n' "$name" "$package" "$(grep -oE 'execs: [0-9]+|new interesting: [0-9]+ \(total: [0-9]+\)' "$log" | tail -n 2 | paste -sd ' ')"
		continue
	fi
	cat "$log"
	input=$(sed -nE 's/.*(testdata\/fuzz\/Fuzz[^ ]*).*/\1/p' "$log" | head -n 1)
	printf '\n%s %s FAILED (%s)\n' "$name" "$package" "$([ $status -eq 124 ] && echo 'it did not end' || echo $status)"
	if [ -n "$input" ]; then
		printf 'input:  %s/%s\nreplay: go test -tags short -run %s %s\n' "$package" "$input" "'^$name\$/^$(basename "$input")\$'" "$package"
	fi
	exit 1
done <<<"$targets"
