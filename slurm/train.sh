#!/usr/bin/env bash
#SBATCH --job-name=ddp_cifar
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --wait-all-nodes=1
#
# Train on a Slurm cluster:
#
#     sbatch [sbatch options] slurm/train.sh [CONFIG.yaml] [key=value ...]
#     slurm/train.sh [sbatch options] -- [CONFIG.yaml] [key=value ...]
#
# The second form looks at the run first (train --dry-run), so that a typo costs seconds and not a wait in the queue, and then
# does the first. Options are sbatch's, such as --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=8:00:00.
#
# The run is in run_dir=runs/JOB_NAME-JOB_ID, unless the arguments have another run_dir; it stays the same when the job is
# requeued. Two minutes before the time limit, and when the job is preempted, the run is asked to stop and saves; the job is
# requeued, and the run goes on. So it is after a crash and after the loss of a node, but not after a mistake or an error of the
# run itself. In an array job %a in the arguments stands for the task's number, such as seed=%a.
#
# Settings, by environment variables:
#   MAX_REQUEUES     times that the job may be requeued (20)
#   NPROC_PER_NODE   ranks on each node; default: the GPUs that the job has there, else 1
#   OMP_NUM_THREADS, MAX_RESTARTS, LOCAL_ADDR   as in launch/node.sh
# What a site needs (modules, an environment, network interfaces) goes into slurm/site.sh: see slurm/README.md.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -e "$here/job.sh" ]; then # in a job this file is a copy in Slurm's spool folder
  here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/train\.sh.*|\1|p' | head -n 1)
  [ -n "$here" ] || here=$SLURM_SUBMIT_DIR/slurm
fi
# shellcheck source=slurm/job.sh
source "$here/job.sh"

if [ -z "${SLURM_JOB_ID:-}" ]; then
  look_and_submit "$here/train.sh" "$@"
  exit
fi

arguments=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
run_dir=runs/$SLURM_JOB_NAME-$job
for argument in "${arguments[@]}"; do
  case $argument in run_dir=*) run_dir=${argument#run_dir=} ;; esac
done
arguments+=("run_dir=$run_dir")
requeues=${SLURM_RESTART_COUNT:-0} max_requeues=${MAX_REQUEUES:-20}

# go_on WHY: have the job requeued, so that the run goes on; or leave that to the chain's next job.
go_on() {
  if [ -n "${CHAIN:-}" ]; then
    echo "job $job: $1; the chain's next job goes on"
    exit 0
  fi
  if [ "$requeues" -ge "$max_requeues" ]; then
    echo "error: $1, and the job was requeued $requeues times (MAX_REQUEUES): sbatch with run_dir=$run_dir goes on" >&2
    exit 1
  fi
  echo "job $job: $1; it is requeued"
  trap '' TERM # which the requeue sends
  scontrol requeue "$job" && exit 0
  echo "error: $1, and Slurm did not requeue the job (above): sbatch with run_dir=$run_dir goes on; see slurm/chain.sh" >&2
  exit 1
}

# end [WHAT]: this job does not go on.
end() {
  [ $# = 0 ] || echo "job $job: $1"
  [ -z "${CHAIN:-}" ] || scancel --name="$SLURM_JOB_NAME" --state=PENDING || true # the jobs that would have gone on
  exit "$status"
}

step='' asked='' ended=''
trap 'asked=1 interrupted=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' USR1 # srun hands it to the nodes
trap 'ended=1 interrupted=1' TERM # cancelled, preempted or requeued: Slurm has settled what becomes of the job, and tells the nodes itself
describe_job "$run_dir" "start $((requeues + 1)), which can be requeued $((max_requeues - requeues)) times"

status=0
if [ "$requeues" = 0 ]; then
  look "${arguments[@]}" || status=$?
  [ "$status" != 2 ] || end # a mistake; if it could not look, the start will tell
  status=0
fi
if [ -z "$asked$ended" ]; then
  start_nodes "$run_dir/logs/start-$job" "${arguments[@]}"
  finish_nodes
fi

state=$(cat "$run_dir/status" 2>/dev/null) || state='never started'
case $ended,$status,$state in
  1,*) end "Slurm has ended this job; it is not requeued from here. The run: $state" ;;
  ,0,"stopped: the file STOP"*) end "the run was $state; sbatch with run_dir=$run_dir goes on" ;;
  ,0,stopped*) go_on "the run was $state" ;;
  ,0,finished) end "the run: $state" ;;
  ,0,*) go_on "asked to stop before the run had started" ;;
  ,[23],* | ,*,finished | ,*,failed*) end ;; # a mistake, a checkpoint that could not be saved, an error: the line above tells
  *) go_on "the run has crashed ($state)" ;;
esac
