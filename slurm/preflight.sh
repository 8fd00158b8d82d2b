#!/usr/bin/env bash
#SBATCH --job-name=ddp_cifar-preflight
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=10
#SBATCH --wait-all-nodes=1
#
# Is this part of the cluster fit for a run? With the run's sbatch options and arguments:
#
#     sbatch [sbatch options] slurm/preflight.sh [CONFIG.yaml] [key=value ...] [--json FILE]
#
# FAILED, with the reasons and what to do in the log, if anything is wrong; docs/diagnosing.md explains what it finds.
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
[ -n "${SLURM_JOB_ID:-}" ] || refuse "expected a job: sbatch [sbatch options] slurm/preflight.sh [CONFIG.yaml] [key=value ...]"
take_place
export MIN_NODES=1
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
kill_on_bad_exit=0 # a node that ends shall not end the others, which will name it
run_module ddp_cifar.preflight --nodes "$NNODES" --hosts "$hosts" "$@"
