#!/usr/bin/env bash
#SBATCH --job-name=ddp_cifar-preflight
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=10
#SBATCH --wait-all-nodes=1
#
# Check whether nodes of a Slurm cluster are ready for a run. Use the sbatch options and the arguments of the run.
#
# Usage:
#
#     sbatch [sbatch options] slurm/preflight.sh [CONFIG.yaml] [key=value ...] [--json FILE]
#
# If a check fails, the job ends as FAILED, and its log says why and what to do. docs/diagnosing.md explains the checks.
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
[ -n "${SLURM_JOB_ID:-}" ] || user_error "this script must run in a Slurm job: use sbatch [sbatch options] slurm/preflight.sh [CONFIG.yaml] [key=value ...]"
set_up_rendezvous
export MIN_NODES=1
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
kill_on_bad_exit=0 # the other nodes must keep running, because they report a node that exits
run_module ddp_cifar.preflight --nodes "$NNODES" --hosts "$hosts" "$@"
