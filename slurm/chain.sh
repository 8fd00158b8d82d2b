#!/usr/bin/env bash
# Submit a run that is longer than the time limit, on a cluster that does not requeue jobs: N jobs, each of which resumes
# where the previous one stopped.
#
# Usage:
#
#     slurm/chain.sh N [sbatch options] -- [CONFIG.yaml] [key=value ...]
#
# The jobs share one name and use --dependency=singleton, so that only one runs at a time. When the run finishes or fails,
# its job cancels the remaining ones. To cancel all jobs, use scancel --name=NAME. The default run_dir is
# runs/chain-DATE-TIME.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=slurm/job.sh
source "$here/job.sh"
check_count N "${1:-}"
count=$1
shift
split_options "$@"
name=chain-$(date +%Y%m%d-%H%M%S)
arguments=("run_dir=runs/$name" "${arguments[@]}")
dry_run_before_submitting
export DDP_CIFAR_CHAIN=1
for ((i = 0; i < count; i++)); do
  sbatch "${options[@]}" --job-name="$name" --dependency=singleton --no-requeue "$here/train.sh" "${arguments[@]}"
done
