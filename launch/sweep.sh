#!/usr/bin/env bash
# Run all runs of a sweep on this machine, one after another.
#
# Usage:
#
#     launch/sweep.sh SWEEP.yaml [key=value ...]
#
# Finished runs are skipped; the others start or resume. After an interruption, run the same command again. The script
# prints a table of all runs at the end.
#
# Each run is started by launch/local.sh and uses its settings (NPROC_PER_NODE, ...). Ctrl-C saves and stops the current
# run, and ends the sweep. The sweep also ends if a run stops at train.deadline or train.max_hours. train.max_hours
# applies to each run separately. If a run fails, the sweep continues with the next one; the failed runs are listed last,
# and the exit status is that of the first failed run.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

need_torchrun
case " $* " in *" -h "* | *" --help "*) exec python -m ddp_cifar.sweep --help ;; esac
runs=$(mktemp)
trap 'rm -f "$runs"' EXIT
python -m ddp_cifar.sweep --null "$@" >"$runs" # fails if any run has an invalid config
run='' interrupted='' count=0
while read_arguments; do count=$((count + 1)); done <"$runs"
# shellcheck disable=SC2329 # called by the traps
forward_signal() { interrupted=1 && [ -z "$run" ] || kill -s "$1" "$run" 2>/dev/null || true; }
trap 'forward_signal INT' INT
trap 'forward_signal TERM' TERM HUP
trap 'forward_signal USR1' USR1
number=0 status=0 run_dirs=() failed=()
while read_arguments; do
  state=${arguments[0]} arguments=("${arguments[@]:1}")
  run_dir=${arguments[-1]#run_dir=} number=$((number + 1))
  [[ $run_dir != -* ]] || run_dir=./$run_dir # otherwise programs would read it as an option
  run_dirs+=("$run_dir")
  if [ "$state" = finished ]; then
    echo "== sweep $number of $count: $run_dir is finished"
    continue
  fi
  echo "== sweep $number of $count: $run_dir ($state)"
  set -m # otherwise background processes ignore SIGINT, and Ctrl-C could not stop the run
  "$here/local.sh" "${arguments[@]}" </dev/null &
  run=$!
  set +m
  [ -z "$interrupted" ] || kill "$run" # a signal arrived just before the start
  wait_for "$run" && exit_status=0 || exit_status=$?
  run=''
  if [ "$exit_status" != 0 ]; then
    [ "$status" != 0 ] || status=$exit_status
    failed+=("$run_dir (exit status $exit_status)")
  fi
  if [ -n "$interrupted" ] || { [ "$exit_status" = 0 ] && grep -qs '^stopped' "$run_dir/status"; }; then
    echo "== sweep: stopped in run $number of $count; run the same command to resume" >&2
    exit "$status"
  fi
done <"$runs"
existing=()
for run_dir in "${run_dirs[@]}"; do
  [ ! -e "$run_dir/metrics.jsonl" ] || existing+=("$run_dir")
done
[ ${#existing[@]} = 0 ] || python -m ddp_cifar.compare "${existing[@]}"
[ "$status" = 0 ] || { printf '== sweep: failed: %s\n' "${failed[@]}" >&2; }
exit "$status"
