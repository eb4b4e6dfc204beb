#!/usr/bin/env bash
# Checks the models of the protocols with spin: they hold in every state, and each
# rule is needed: without it spin finds the counterexample in the table.
#
#   MODEL=full   also checks the largest configurations
#   VERBOSE=1    prints each counterexample as its sequence of events
#   JOBS=2       the number of concurrent checks; each takes up to 3.8 GB of memory
#   ONLY=regexp  only the rows whose name matches
set -euo pipefail
cd "$(dirname "$0")"
folder=$PWD
MODEL=${MODEL:-} VERBOSE=${VERBOSE:-0} JOBS=${JOBS:-2} ONLY=${ONLY:-.}

need() {
	local missing=()
	command -v spin >/dev/null || missing+=(spin)
	command -v gcc >/dev/null || missing+=(gcc libc6-dev)
	[ ${#missing[@]} -gt 0 ] || return 0
	if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
		echo "installing ${missing[*]}"
		{ apt-get install -y --no-install-recommends "${missing[@]}" ||
			{ apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; }; } >/dev/null 2>&1 || true
	fi
	if ! command -v spin >/dev/null || ! command -v gcc >/dev/null; then
		echo "the models need ${missing[*]}: on Debian and Ubuntu apt-get install ${missing[*]}; else see https://spinroot.com" >&2
		exit 2
	fi
}

# kind | name | model | switches | expected counterexample | failure
#
#   holds   no error in the whole state space
#   spare   the same, without a rule that the models do not need
#   breaks  without a rule: spin finds the expected counterexample
table() {
	local L='-DCREATORS=1 -DUNITS=1 -DRECLAIMERS=1 -DRESTORES=0 -DDROPCOLL=0'
	local R='-DLEADERS=1 -DATTEMPTS=1 -DCANCELS=0 -DDROPS=0 -DUSERS=0 -DRETIRES=0 -DSWEEPERS=0'
	local file='lost: a file that a snapshot needs' objects='lost: an object of a snapshot'
	local half='published and not whole' left='left over by a failed job'
	sed 's/^\t*//; s/ *| */|/g; /^$/d' <<-TABLE
	holds | restore | restore | | |
	holds | lifecycle, pending keys younger | lifecycle | -DR_GRANT_PENDING=2 | |
	holds | lifecycle | lifecycle | | |
	holds | lifecycle, generation before | lifecycle | -DR_GEN_FIRST=2 -DUNITS=1 | |
	holds | lifecycle, generation before, younger | lifecycle | -DR_GEN_FIRST=2 -DR_GRANT_PENDING=2 -DRECLAIMERS=1 | |
	holds | lifecycle, answers lost | lifecycle | -DUNITS=1 -DRECLAIMERS=1 -DLOST=1 -DRESTORES=0 | |
	holds | lifecycle, answers lost, younger | lifecycle | -DUNITS=1 -DRECLAIMERS=1 -DLOST=1 -DRESTORES=0 -DR_GRANT_PENDING=2 | |
	holds | lifecycle, with sweep | lifecycle | -DRECLAIMERS=1 -DUNITS=1 -DSWEEPERS=1 | |
	holds | lifecycle, files of a live segment | lifecycle | -DPARTS=1 -DUNITS=1 -DR_GRANT_PENDING=2 | |
	holds | lifecycle, nothing late, no sweep | lifecycle | -DRECLAIMERS=1 -DLATE_PUT=0 -DR_SWEEP=0 | |
	$([ "$MODEL" != full ] || cat <<-FULL
	holds | full: lifecycle, younger, sweep | lifecycle | -DR_GRANT_PENDING=2 -DSWEEPERS=1 | |
	holds | full: lifecycle, answers lost | lifecycle | -DRECLAIMERS=1 -DLOST=1 | |
	FULL
	)
	breaks | PIN_THEN_LOOK | lifecycle | $L | $file | a unit is dropped and deleted between the read of the catalog and the pending key
	breaks | CAPTURE_ACTIVE | lifecycle | $L -DDROPCOLL=1 | captured half of a collection | the collection is dropped after begin, and the rest of it is captured
	breaks | COMMIT_PENDING | lifecycle | $L | $file | a creator that lost its pending key commits files that were reclaimed since
	breaks | PENDING_ONCE | lifecycle | $L | $file | a creator puts its lost pending key again, and commits files that were reclaimed in between
	breaks | COMMIT_BUMP | lifecycle | $L | $file | a grant does not see that a snapshot was committed since the references were read
	breaks | OWN_LEASE | lifecycle | $L -DLOST=1 | PENDING forever | a begin that is applied late is kept by the lease of a live process
	breaks | ABORT_VERDICT | lifecycle | $L -DLOST=1 | committed after "it failed" | a commit that was not visible yet is applied later
	breaks | REAP_STATE | lifecycle | $L | lost: a committed snapshot | the pending key is gone because the snapshot was committed
	breaks | RECORD_LAST | lifecycle | $L -DLATE_PUT=0 -DR_SWEEP=0 | leaked: an object without a record | the record is deleted first, and its leader dies: the objects are unknown
	breaks | KEY_BY_ID | lifecycle | $L -DCREATORS=2 | $objects | a late delete for the one snapshot removes the objects of the next of that name
	breaks | SWEEP | lifecycle | $L | leaked: an object without a record | a frozen creator writes objects after its record is gone
	breaks | SWEEP_ORDER | lifecycle | $L -DSWEEPERS=1 | $objects | a snapshot that began after the records were read has no record
	breaks | GRANT | lifecycle | $L | $file | a delete after a read of the references misses the pending snapshot
	breaks | GRANT_PENDING=0 | lifecycle | $L | $file | a pending snapshot captured the unit before it was dropped
	breaks | GRANT_PENDING=3 | lifecycle | $L | $file | only pending keys older than the drop count
	breaks | GRANT_GEN | lifecycle | $L | $file | a snapshot was committed between the references and the grant
	breaks | GEN_FIRST=0 | lifecycle | $L | $file | a snapshot was committed between the references and the generation
	breaks | GRANT_UNIT | lifecycle | $L -DRECLAIMERS=2 | granted twice | two grants of one unit: two tombstones, and only one will be confirmed
	breaks | LATER=0 | lifecycle | $L -DPARTS=1 | leaked: an unneeded file | a snapshot that began after the removal of the files has the segment, and counts
	breaks | LATER=2 | lifecycle | $L -DPARTS=1 | $file | a snapshot captured the files, which were removed before its commit
	breaks | HISTORY | lifecycle | $L -DPARTS=1 | $file | in a copied store each snapshot seems to have begun after the removal of the files
	breaks | ALL_REFS | lifecycle | $L | $file | references that could not be read count as none
	breaks | TOMB | lifecycle | $L | leaked: an unneeded file | the unit's record is gone, its reclaimer dies before the delete
	breaks | CONFIRM | lifecycle | $L | leaked: an unneeded file | a delete without a response did not happen, and its record is gone
	breaks | GRANT_FINAL | lifecycle | $L | lost: a file of the catalog | a grant is revoked, the delete comes late
	breaks | NO_REUSE | lifecycle | $L -DRECLAIMERS=2 | lost: a file of the catalog | a second, late delete removes a later object of the same key
	breaks | DROP_PINS | lifecycle | $L -DRESTORES=1 | $objects | a snapshot that is being restored is dropped
	breaks | DROP_PINS_TXN | lifecycle | $L -DRESTORES=1 | $objects | the pin is put between the read of the pins and the drop
	breaks | PIN_DURABLE | lifecycle | $L -DRESTORES=1 | $objects | the pin ends with its replica, the restore continues
	breaks | PIN_COMPARES | lifecycle | $L -DRESTORES=1 | $objects | the snapshot is dropped before its pin is put
	breaks | ADMIT_ONE | restore | $R -DDROPS=1 | a source is gone under a running job | the snapshot is dropped between the job and its pin
	breaks | PIN | restore | $R -DDROPS=1 | a source is gone under a running job | the snapshot is dropped under the job
	breaks | CLAIM | restore | $R -DUSERS=1 | two collections of one name | another collection takes the name, and the job publishes under it
	breaks | PREPARE_JOB | restore | $R | $left | a transaction of prepare is applied after roll back removed its keys
	breaks | TASK_JOB | restore | $R -DCANCELS=1 | $left | a worker registers segments after roll back removed them
	breaks | SAME_BYTES | restore | $R -DATTEMPTS=2 | $half | a second attempt replaces the object, and its ETag is not the one registered
	breaks | VERIFY | restore | $R | $half | a response reported a copy that did not happen
	breaks | PUBLISH_TASKS | restore | $R | $half | a collection without segments is published
	breaks | PUBLISH_JOB | restore | $R -DLEADERS=2 -DCANCELS=1 | $half | a leader publishes a job that another rolls back
	breaks | ROLLBACK_FIRST | restore | $R -DLEADERS=2 | $half | a leader deletes after a read, another publishes
	breaks | END_LAST | restore | $R | $left | the job is FAILED, its leader dies, no replica continues it
	breaks | SWEEP | restore | $R | $left | a worker copies after roll back is over
	breaks | SWEEP=2 | restore | $R -DATTEMPTS=2 -DRETIRES=1 | leaked: a target file | a straggler of the second attempt brings back a reclaimed file
	breaks | SWEEP_ENDED | restore | $R -DSWEEPERS=1 | $half | files that are copied and not yet registered have no record
	spare | RECORD_LAST | lifecycle | $L -DDROPCOLL=1 | | with a sweep of everything, the order is not needed
	spare | LEADER | restore | -DDROPS=0 -DUSERS=0 -DSWEEPERS=0 | | each write also compares the job
	spare | TASK_ATTEMPT | restore | -DDROPS=0 -DUSERS=0 -DSWEEPERS=0 | | each attempt makes the same objects
	TABLE
}

# check <number> <kind> <name> <model> <switches> <find> <why>: writes its line to
# $work/<number>.line and, if it fails, $work/<number>.bad.
check() {
	local number=$1 kind=$2 name=$3 model=$4 switches=$5 find=$6 why=$7
	local dir=$work/$number began verdict=ok states seconds found='' line replay=''
	local -a flags search=(-DCOLLAPSE)
	read -ra flags <<<"$switches"
	if [ "$kind" != holds ]; then
		case $name in
		*=*) flags+=("-DR_$name") ;;
		*) flags+=("-DR_${name%%,*}=0") ;;
		esac
	fi
	# Breadth first, so that the counterexample is a shortest one.
	[ "$kind" != breaks ] || search=(-DBFS)
	mkdir "$dir"
	cd "$dir"
	cp "$folder/$model.pml" .
	began=$(date +%s%N)
	if ! { spin -a ${flags[@]+"${flags[@]}"} "$model.pml" && gcc -O2 -w -DSAFETY -DMEMLIM=3800 "${search[@]}" -o pan pan.c; } >out 2>&1; then
		verdict="did not compile: $(tail -n 3 out | tr '\n' ' ')"
	else
		{ ./pan -m200000 "-w$([ "$kind" = holds ] && echo 25 || echo 20)" || true; } >out 2>&1
		if [ "$kind" = breaks ] && grep -q 'errors: 1$' out && [ -s "$model.pml.trail" ]; then
			replay=$(spin -t ${flags[@]+"${flags[@]}"} "$model.pml" 2>&1 || true)
			line=$(sed -n "s/^spin: $model.pml:\([0-9]*\), Error: assertion violated.*/\1/p" <<<"$replay" | head -n 1)
			found=$(sed -n "${line:-1}s,.*/\* \(.*\) \*/[^*]*$,\1,p" "$model.pml")
			[ "$found" = "$find" ] || verdict="found \"$found\" instead of \"$find\""
		elif [ "$kind" = breaks ]; then
			verdict="NO COUNTEREXAMPLE: the rule is not needed, or the model does not show it"
		elif grep -q 'errors: [1-9]' out; then
			verdict="COUNTEREXAMPLE: $(grep -m1 '^pan:1' out)"
			replay=$(spin -t ${flags[@]+"${flags[@]}"} "$model.pml" 2>&1 || true)
		elif ! grep -q 'errors: 0$' out || grep -qE 'max search depth too small|out of memory|Search not completed|hashing|aborted' <(sed '/hash table/d; /hash conflicts/d; /hash factor/d' out); then
			verdict="NOT PROVED, the search is not complete: $(grep -m1 -E 'too small|out of memory|not completed|aborted' out || tail -n 1 out)"
		fi
	fi
	seconds=$((($(date +%s%N) - began) / 100000000))
	states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' out | head -n 1)
	{
		printf '%-6s %-38s %-21s %11s states %4d.%d s' "$kind" "$name" \
			"$([ "$verdict" != ok ] && echo FAILED || { [ "$kind" = breaks ] && echo counterexample found || echo ok; })" \
			"${states:-0}" $((seconds / 10)) $((seconds % 10))
		printf '\n'
		if [ "$verdict" != ok ]; then
			printf '       %s\n' "$verdict"
		fi
		if [ "$VERBOSE" = 1 ] || [ "$verdict" != ok ]; then
			[ -z "$why" ] || printf '       %s\n' "$why"
			[ -z "$found" ] || printf '       found: %s\n' "$found"
			[ -z "$replay" ] || events "$replay"
		fi
	} >"$work/$number.line"
	[ "$verdict" = ok ] || : >"$work/$number.bad"
	cat "$work/$number.line"
	rm -rf "$dir"
}

# events prints the events of a replayed trail, one per line.
events() {
	sed -n '/^ *\(late: *\)\?\(create\|lease\|leader\|leader,\|user\|compaction\|reclaimer\|reclaim\|restore\|sweep\|engine\|worker\|target\)\b.*[ :]/{s/^ */         - /;s/late:  */late: /;p}' <<<"$1"
}

need
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
began=$SECONDS number=0
while IFS='|' read -r kind name model switches find why; do
	[[ $kind/$name =~ $ONLY ]] || continue
	while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
	number=$((number + 1))
	(check "$number" "$kind" "$name" "$model" "$switches" "$find" "$why") &
done < <(table)
wait
bad=$(find "$work" -name '*.bad' | wc -l)
lines=$(find "$work" -name '*.line' | wc -l)
if [ "$number" -eq 0 ] || [ "$lines" -ne "$number" ] || [ "$bad" -ne 0 ]; then
	echo "models: $bad of $number FAILED, $((number - lines)) without a result, after $((SECONDS - began)) s" >&2
	exit 1
fi
echo "models: all $number as expected, after $((SECONDS - began)) s"
