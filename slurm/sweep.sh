#!/usr/bin/env bash
# Submit the runs of a sweep to a Slurm cluster, as an array job of slurm/train.sh with one task per run.
#
# Usage:
#
#     slurm/sweep.sh [sbatch options] -- SWEEP.yaml [key=value ...]
#
# The sbatch options apply to each task. Finished runs are skipped; the others start or resume. After an interruption, run
# the same command again. AT_ONCE=N limits the sweep to N running tasks. When the tasks are done, python -m ddp_cifar.compare
# prints a table. Each task reads its arguments from a file in the sweep's folder.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=slurm/job.sh
source "$here/job.sh"
split_options "$@"
[ -z "$task" ] || user_error "--array is set by the sweep itself: use AT_ONCE=N to limit the number of running tasks"
for option in "${options[@]}"; do
  case $option in --chdir* | -D*) user_error "$option is not supported for a sweep: submit the sweep from that folder" ;; esac
done
[ -z "${AT_ONCE:-}" ] || check_count AT_ONCE "$AT_ONCE"
need_torchrun # ddp_cifar.sweep runs here, so a container on the nodes is not enough
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m ddp_cifar.sweep --null "${arguments[@]}" >"$work/runs"

tasks=() first=() number=0
while read_arguments; do
  number=$((number + 1))
  printf '%s\0' "${arguments[@]:1}" '' >>"$work/arguments"
  [ "${arguments[0]}" != finished ] || continue
  tasks+=("$number")
  [ ${#first[@]} != 0 ] || first=("${arguments[@]:1}")
done <"$work/runs"
[ ${#tasks[@]} != 0 ] || { echo "all $number runs are finished" && exit; }
arguments=("${first[@]}")
dry_run_before_submitting
folder=$(dirname -- "${arguments[-1]#run_dir=}")
[[ $folder != -* ]] || folder=./$folder # otherwise programs would read it as an option
name=sweep-${folder//[^[:alnum:]._-]/-}
queued=$(squeue --me --noheader --name="$name" --states=PENDING,RUNNING,SUSPENDED --format=%F | sort -u | paste -sd ' ')
[ -z "$queued" ] || user_error "this sweep is already queued (job $queued): wait for it, or cancel it with scancel"
mkdir -p "$folder"
# Requeued tasks of an earlier submission read their arguments again, so a changed sweep needs a new file.
file=$folder/runs-$(cksum <"$work/arguments" | cut -d ' ' -f 1)
cp "$work/arguments" "$file.$$"
mv "$file.$$" "$file"
array=$(IFS=, && echo "${tasks[*]}")
sbatch "${options[@]}" --job-name="$name" --array="$array${AT_ONCE:+%$AT_ONCE}" "$here/train.sh" "@$file"
printf 'submitted %s of %s runs; to compare them when they are done: python -m ddp_cifar.compare %q/*/\n' "${#tasks[@]}" "$number" "$folder"
