#!/usr/bin/env bash
#SBATCH --job-name=ddp_cifar-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --wait-all-nodes=1
#
# Evaluate a trained network on a Slurm cluster, each image once, on any number of nodes:
#
#     sbatch [sbatch options] slurm/evaluate.sh CHECKPOINT|RUN_DIR [key=value ...] [--split val] [--json FILE] ...
#
# Settings as for slurm/train.sh.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -e "$here/job.sh" ]; then # in a job this file is a copy in Slurm's spool folder
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p' | sed -n 1p)
  [ -e "$script" ] || script=${script%%.sh *}.sh # its arguments stand behind it
  here=$(dirname "$(readlink -f "$script")")
  [ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm
fi
# shellcheck source=slurm/job.sh
source "$here/job.sh"
[ -n "${SLURM_JOB_ID:-}" ] || refuse "expected a job: sbatch [sbatch options] slurm/evaluate.sh CHECKPOINT [key=value ...]"
take_place
run_module ddp_cifar.evaluate "$@"
