#!/usr/bin/env bash
# Writes into a folder what `go test -overlay` needs for a runtime of Go that
# chooses nothing by chance: which of several ready cases a select takes, the
# order of timers of one instant come from a generator that the simulation seeds,
# that of a map is always the same, and goroutines are not interrupted. It fails when the runtime
# is not as it knows it.
#
#	test/sim/exact.sh FOLDER    # writes FOLDER/overlay.json
set -euo pipefail
folder=$1
src=$("${GO:-go}" env GOROOT)/src/runtime
mkdir -p "$folder"

# change FILE FROM TO: one line of a file of the runtime is another.
change() {
	local copy=$folder/$1
	[ -e "$copy" ] || cp "$src/$1" "$copy"
	chmod u+w "$copy"
	[ "$(grep -cF -- "$2" "$copy")" -eq 1 ] || { echo "exact.sh: $1 of this release of Go has no line, or several, with: $2" >&2; exit 1; }
	FROM=$2 TO=$3 perl -pi -e 's/\Q$ENV{FROM}\E/$ENV{TO}/' "$copy"
}

rm -f "$folder"/*.go
change select.go 'j := cheaprandn(uint32(norder + 1))' 'j := simChoose(uint32(norder + 1))'
change time.go 't.rand = cheaprand()' 't.rand = simChoose(1 << 31)'
change alg.go 'hashkey[i] = uintptr(bootstrapRand())' 'hashkey[i] = uintptr(i)*0x9e3779b97f4a7c15 + 1'
change alg.go 'key[i] = bootstrapRand()' 'key[i] = uint64(i)*0x9e3779b97f4a7c15 + 1'
change proc.go 'const forcePreemptNS = 10 * 1000 * 1000' 'const forcePreemptNS = 3600 * 1000 * 1000 * 1000'
change proc.go 'const randomizeScheduler = raceenabled' 'const randomizeScheduler = false'
change rand.go 'func maps_rand() uint64 {' 'func maps_rand() uint64 {
	return 1
}

var simState uint64 // one processor runs all that uses it

//go:linkname sim_seed github.com/snapshotd/snapshotd/test/sim.seedRuntime
func sim_seed(seed uint64) { simState = seed }

// simChoose returns a number below n: in a bubble of virtual time the next of the
// generator, else any.
func simChoose(n uint32) uint32 {
	if getg().bubble == nil {
		return cheaprandn(n)
	}
	simState += 0x9e3779b97f4a7c15
	z := simState
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb
	return uint32(((z ^ (z >> 31)) >> 32) * uint64(n) >> 32)
}

func maps_rand_of_go() uint64 {'
{
	printf '{"Replace":{'
	comma=
	for copy in "$folder"/*.go; do
		printf '%s"%s":"%s"' "$comma" "$src/$(basename "$copy")" "$copy"
		comma=,
	done
	printf '}}\n'
} >"$folder/overlay.json"
