#!/usr/bin/env bash
# Runs fault tests over and over, to find those that fail by chance: tests/bench/repeat_faults.sh OUT LANES SECONDS [TEST...]
# A lane has two cores (to itself where there are enough) and runs the tests again and again, every second one in reverse, until the time
# is over. $PYTHON: the interpreter; $PYTEST_ADDOPTS: a choice among the tests. Ends with how often each test passed and failed.
set -muo pipefail # -m: each lane is a process group of its own
out=$1 lanes=$2 seconds=$3; shift 3
tests=("${@:-tests/faults/test_processes.py}"); [[ $# -gt 0 ]] || tests+=(tests/faults/test_watch.py)
python=${PYTHON:-python3}; mkdir -p "$out"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=''

lane() {
  local order=("${tests[@]}") cores
  cores=$(nproc --all) # plain nproc prints OMP_NUM_THREADS where that is set
  local pair=$((2 * $1 % cores)),$(((2 * $1 + 1) % cores))
  (($1 % 2)) && mapfile -t order < <(printf '%s\n' "${tests[@]}" | tac)
  while :; do
    taskset -c "$pair" "$python" -m pytest -v -x -p no:cacheprovider --basetemp "$work/$1" "${order[@]}" >> "$out/lane$1.log" 2>&1
  done
}

work=$(mktemp -d) pids=()
for ((n = 0; n < lanes; n++)); do
  lane "$n" &
  pids+=($!)
done
sleep "$seconds"
grep -hoE '^tests/\S+ (PASSED|FAILED|ERROR)' "$out"/lane*.log | sort | uniq -c > "$out/tally.txt" # before anything is ended
for pid in "${pids[@]}"; do kill -KILL -- "-$pid"; done
wait 2> /dev/null
rm -rf "$work"
cat "$out/tally.txt"
! grep -q 'FAILED\|ERROR' "$out/tally.txt"
