#!/usr/bin/env bash
# The runs of a sweep on this machine, one after another:
#
#     launch/sweep.sh SWEEP.yaml [key=value ...]
#
# Runs that are finished are skipped, the others start, or go on from where they are: after an interruption, the same command again.
# The table of all of them comes at the end. Each is started by launch/local.sh, whose settings (NPROC_PER_NODE ...) count here too;
# Ctrl-C stops the run that is under way, which saves, and with it the sweep. So does a run that stops by itself, by train.deadline, or
# by train.max_hours, which each run has anew. One that fails does not keep the next ones from theirs: they are named last, and
# the exit status is that of the first.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

need_torchrun
case " $* " in *" -h "* | *" --help "*) exec python -m ddp_cifar.sweep --help ;; esac
lines=$(python -m ddp_cifar.sweep --lines "$@") # refuses what is wrong with any of them
run='' interrupted='' arguments=()
# shellcheck disable=SC2329 # by the traps
pass_on() { interrupted=1 && [ -z "$run" ] || kill -s "$1" "$run" 2>/dev/null || true; }
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
trap 'pass_on USR1' USR1
count=$(wc -l <<<"$lines") number=0 status=0 run_dirs=() failed=()
while read -r state quoted; do
  eval "arguments=($quoted)" # as Python's shlex has quoted them
  run_dir=${arguments[-1]#run_dir=} number=$((number + 1))
  run_dirs+=("$run_dir")
  if [ "$state" = finished ]; then
    echo "== sweep $number of $count: $run_dir is finished"
    continue
  fi
  echo "== sweep $number of $count: $run_dir ($state)"
  set -m # else the shell has its background ignore Ctrl-C, and the run could not be stopped by it
  "$here/local.sh" "${arguments[@]}" </dev/null &
  run=$!
  set +m
  [ -z "$interrupted" ] || kill "$run" # which came just before
  wait_for "$run" && ended=0 || ended=$?
  run=''
  if [ "$ended" != 0 ]; then
    [ "$status" != 0 ] || status=$ended
    failed+=("$run_dir ($ended)")
  fi
  if [ -n "$interrupted" ] || { [ "$ended" = 0 ] && grep -qs '^stopped' "$run_dir/status"; }; then
    echo "== sweep: stopped in run $number of $count; the same command goes on" >&2
    exit "$status"
  fi
done <<<"$lines"
there=()
for run_dir in "${run_dirs[@]}"; do
  [ ! -e "$run_dir/metrics.jsonl" ] || there+=("$run_dir")
done
[ ${#there[@]} = 0 ] || python -m ddp_cifar.compare "${there[@]}"
[ "$status" = 0 ] || { printf '== sweep: failed, with the status behind it: %s\n' "${failed[@]}" >&2; }
exit "$status"
