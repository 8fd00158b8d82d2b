#!/usr/bin/env bash
# The runs of a sweep on a Slurm cluster, as an array job of slurm/train.sh:
#
#     slurm/sweep.sh [sbatch options] -- SWEEP.yaml [key=value ...]
#
# A task a run; the options are for each of them. Runs that are finished are left out, the others start, or go on from where they
# are: after an interruption, the same command again. AT_ONCE=N has at most so many run at a time. python -m ddp_cifar.compare makes
# the table. Each task reads its arguments from its line of a file in the runs' folder.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=slurm/job.sh
source "$here/job.sh"
split_options "$@"
[ -z "$task" ] || refuse "--array is the sweep's own: AT_ONCE=N says how many tasks may run at a time"
for option in "${options[@]}"; do
  case $option in --chdir* | -D*) refuse "$option: a sweep's runs are looked at from here; submit it from that folder" ;; esac
done
[ -z "${AT_ONCE:-}" ] || check_count AT_ONCE "$AT_ONCE"
need_torchrun # and so the packages, here too, and not in the jobs' container alone
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
name=sweep-${folder//[^[:alnum:]._-]/-}
waiting=$(squeue --me --noheader --name="$name" --states=PENDING,RUNNING,SUSPENDED --format=%F | sort -u | paste -sd ' ')
[ -z "$waiting" ] || refuse "this sweep is in the queue already (job $waiting): wait for it, or scancel it"
mkdir -p "$folder"
# tasks of an earlier submission may be requeued, and read their lines again: another sweep is another file
lines=$(cut -d ' ' -f 2- <<<"$lines")
file=$folder/runs-$(cksum <<<"$lines" | cut -d ' ' -f 1).txt
echo "$lines" >"$file.$$"
mv "$file.$$" "$file"
array=$(IFS=, && echo "${tasks[*]}")
sbatch "${options[@]}" --job-name="$name" --array="$array${AT_ONCE:+%$AT_ONCE}" "$here/train.sh" "@$file"
printf '%s of %s runs; when they have ended: python -m ddp_cifar.compare %q/*/\n' "${#tasks[@]}" "$number" "$folder"
