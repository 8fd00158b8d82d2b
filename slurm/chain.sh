#!/usr/bin/env bash
# A run longer than the time limit, where jobs cannot be requeued: N jobs, each of which goes on where the one before it stopped.
#
#     slurm/chain.sh N [sbatch options] -- [CONFIG.yaml] [key=value ...]
#
# They have one name and Slurm's --dependency=singleton, so that one runs at a time. The one that finishes the run, or in which it
# fails, cancels the rest; scancel --name=NAME cancels all. The run is in run_dir=runs/chain-DATE-TIME, unless the arguments have another run_dir.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=slurm/job.sh
source "$here/job.sh"
check_count "the number of jobs" "${1:-}"
count=$1
shift
split_options "$@"
name=chain-$(date +%Y%m%d-%H%M%S)
arguments=("run_dir=runs/$name" "${arguments[@]}")
look_before_the_queue
export DDP_CIFAR_CHAIN=1
for ((i = 0; i < count; i++)); do
  sbatch "${options[@]}" --job-name="$name" --dependency=singleton --no-requeue "$here/train.sh" "${arguments[@]}"
done
