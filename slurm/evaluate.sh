#!/usr/bin/env bash
#SBATCH --job-name=ddp_cifar-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --wait-all-nodes=1
#
# Evaluate a trained model on a Slurm cluster, on any number of nodes. Each image is evaluated exactly once.
#
# Usage:
#
#     sbatch [sbatch options] slurm/evaluate.sh CHECKPOINT|RUN_DIR [key=value ...] [--split val] [--json FILE] ...
#
# NPROC_PER_NODE, OMP_NUM_THREADS and slurm/site.sh work as for slurm/train.sh.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -e "$here/job.sh" ]; then # Slurm runs a copy of this file from its spool folder
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p' | sed -n 1p)
  [ -e "$script" ] || script=${script%%.sh *}.sh # the line also holds the arguments
  here=$(dirname "$(readlink -f "$script")")
  [ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm
fi
# shellcheck source=slurm/job.sh
source "$here/job.sh"
[ -n "${SLURM_JOB_ID:-}" ] || user_error "this script must run in a Slurm job: use sbatch [sbatch options] slurm/evaluate.sh CHECKPOINT [key=value ...]"
set_up_rendezvous
run_module ddp_cifar.evaluate "$@"
