#!/usr/bin/env bash
# The runs of a sweep on a Slurm cluster, as an array job of slurm/train.sh:
#
#     slurm/sweep.sh [sbatch options] -- SWEEP.yaml [key=value ...]
#
# A task a run; the options are for each of them. Runs that are finished are left out, the others start, or go on from where they
# are: after an interruption, the same command again. AT_ONCE=N has at most so many run at a time. python -m ddp_cifar.compare makes the
# table; the runs' folder has a line a run in runs.txt, which is what each task reads.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=slurm/job.sh
source "$here/job.sh"
split_options "$@"
[ -z "$task" ] || refuse "--array is the sweep's own: AT_ONCE=N says how many tasks may run at a time"
[ -z "${AT_ONCE:-}" ] || check_count AT_ONCE "$AT_ONCE"
command -v python >/dev/null || refuse "python is not on PATH: set up the environment in slurm/site.sh, or make one with \`make install\`"
lines=$(python -m ddp_cifar.sweep --lines "${arguments[@]}")

tasks=() number=0
while read -r state quoted; do
  number=$((number + 1))
  [ "$state" != finished ] || continue
  tasks+=("$number")
  [ ${#tasks[@]} != 1 ] || first=$quoted
done <<<"$lines"
[ ${#tasks[@]} != 0 ] || { echo "all $number runs are finished" && exit; }
eval "arguments=($first)" # as Python's shlex has quoted them
look_before_the_queue
folder=$(dirname "${arguments[-1]#run_dir=}")
mkdir -p "$folder"
cut -d ' ' -f 2- <<<"$lines" >"$folder/runs.txt"
array=$(IFS=, && echo "${tasks[*]}")
sbatch --job-name="sweep-$(basename "$folder")" "${options[@]}" --array="$array${AT_ONCE:+%$AT_ONCE}" "$here/train.sh" "@$folder/runs.txt"
echo "${#tasks[@]} of $number runs; when they have ended: python -m ddp_cifar.compare $folder/*/"
