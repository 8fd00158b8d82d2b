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
# run itself. In an array job %a in the arguments stands for the task's number, such as seed=%a, and @FILE for the arguments in
# that line of a file, quoted as for a shell (slurm/sweep.sh).
#
# Settings, by environment variables:
#   MAX_REQUEUES     times that the job may be requeued (20)
#   NPROC_PER_NODE   ranks on each node; default: the GPUs that the job has there, else 1
#   OMP_NUM_THREADS, MAX_RESTARTS, LOCAL_ADDR   as in launch/node.sh
# What a site needs (modules, an environment, network interfaces) goes into slurm/site.sh: see slurm/README.md.
set -euo pipefail
step='' asked='' ended=''
# from Slurm: stop, and go on later; srun hands it to the nodes
trap 'asked=1 interrupted=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' USR1
# from Slurm: cancelled, preempted, requeued, out of time; it has settled what becomes of the job, and tells the nodes itself
trap 'ended=1 interrupted=1' TERM
here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -e "$here/job.sh" ]; then # in a job this file is a copy in Slurm's spool folder
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p' | sed -n 1p)
  [ -e "$script" ] || script=${script%%.sh *}.sh # its arguments stand behind it
  here=$(dirname "$(readlink -f "$script")")
  [ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm
fi
# shellcheck source=slurm/job.sh
source "$here/job.sh"

if [ -z "${SLURM_JOB_ID:-}" ] || is_by_hand "$@"; then
  look_and_submit "$here/train.sh" "$@"
  exit
fi
take_place

arguments=()
for argument in "$@"; do
  if [[ $argument == @* ]]; then
    line=${SLURM_ARRAY_TASK_ID:-1}
    if [ "$line" = 0 ] || ! quoted=$(sed -n "${line}p" "${argument#@}") || [ -z "$quoted" ]; then
      refuse "$argument: expected a file that has the arguments of task $line in its line $line"
    fi
    eval "arguments+=($quoted)"
  else
    arguments+=("${argument//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
  fi
done
run_dir=runs/$SLURM_JOB_NAME-$job
requeues=${SLURM_RESTART_COUNT:-0} max_requeues=${MAX_REQUEUES:-20}
for argument in "${arguments[@]}"; do
  case $argument in
    run_dir=*) run_dir=${argument#run_dir=} ;;
    resume=never) [ "$requeues" = 0 ] || arguments+=(resume=auto) ;; # it was meant for the first start
  esac
done
arguments+=("run_dir=$run_dir")
# shellcheck disable=SC2016 # OmegaConf's, not the shell's
[[ $run_dir != *'${'* ]] || refuse "run_dir=$run_dir: expected a folder's name without \${...}"
[[ $max_requeues =~ ^[0-9]+$ ]] || refuse "MAX_REQUEUES=$max_requeues is not a count: expected a whole number from 0 on"

# go_on WHY: have the job requeued, so that the run goes on; or leave that to the chain's next job.
go_on() {
  local try how="sbatch with run_dir=$run_dir goes on"
  if [ -n "${DDP_CIFAR_CHAIN:-}" ]; then
    if [ -n "$(squeue --noheader --name="$SLURM_JOB_NAME" --states=PENDING)" ]; then
      echo "job $job: $1; the chain's next job goes on"
      exit 0
    fi
    echo "error: $1, and this was the chain's last job: another chain with run_dir=$run_dir goes on" >&2
    exit 1
  fi
  if [ "$requeues" -ge "$max_requeues" ]; then
    echo "error: $1, and the job was requeued $requeues times (MAX_REQUEUES): $how" >&2
    exit 1
  fi
  echo "job $job: $1; it is requeued"
  trap '' TERM # which the requeue sends
  for try in 1 2 3; do
    scontrol requeue "$job" && exit 0
    sleep $((10 * try)) # the controller may be busy, or changing over
  done
  echo "error: $1, and Slurm did not requeue the job (above): $how; see slurm/chain.sh" >&2
  exit 1
}

# end [WHAT]: the run does not go on by itself, nor does a chain. With WHAT it is as it should be, and so is the job.
end() {
  [ $# = 0 ] || { status=0 && echo "job $job: $1"; }
  [ -z "${DDP_CIFAR_CHAIN:-}" ] || scancel --name="$SLURM_JOB_NAME" --state=PENDING || true
  exit "$status"
}

# stop_by_hand: Ctrl-C in an allocation of one's own; the second time it does not wait.
# shellcheck disable=SC2329 # by the trap
stop_by_hand() {
  local signal=USR1
  [ -z "$ended" ] || signal=TERM
  ended=1 interrupted=1
  [ -z "$step" ] || kill -s "$signal" "$step" 2>/dev/null || true
}
trap stop_by_hand INT HUP
describe_job "$run_dir" "start $((requeues + 1)), which can be requeued $((max_requeues - requeues)) times"

status=0
if [ "$requeues" = 0 ]; then
  look "${arguments[@]}" || status=$?
  [ "$status" = 0 ] || [ -n "$asked$ended" ] || end # the lines above tell
  status=0
fi
# the run writes its status as soon as it trains; one of an earlier start says nothing about this one
sign() { stat --format='%i %y' "$run_dir/status" 2>/dev/null || true; }
before=$(sign)
if [ -z "$asked$ended" ]; then
  start_nodes "$run_dir/logs/start-$job" "${arguments[@]}"
  finish_nodes
fi
state='never started'
if [ "$(sign)" != "$before" ]; then
  state=$(cat "$run_dir/status")
  rm -f "$run_dir/logs/never-started-$job"
fi
case $ended,$status,$state in
  1,*)
    echo "job $job: Slurm or its user has ended this job; it is not requeued from here. The run: $state"
    exit "$status"
    ;;
  ,3,* | ,*,failed*) end ;; # a checkpoint that could not be saved, an error of the run: the line above tells
  # these are written when all is on the disk; a process that is killed after that changes nothing
  ,*,"stopped: the file STOP"* | ,*,"stopped: train.deadline"*) end "the run was $state; sbatch with run_dir=$run_dir goes on" ;;
  ,*,stopped*) go_on "the run was $state" ;;
  ,*,finished) end "the run: $state" ;;
  ,*,"never started")
    # the first start: a mistake that the look could not see. Later: a lost node's lock, a node without the environment
    if [ -z "$asked" ]; then
      [ "$status,$requeues" != 2,0 ] || end
      [ ! -e "$run_dir/logs/never-started-$job" ] || end
      touch "$run_dir/logs/never-started-$job" || end
    fi
    go_on "the run never started"
    ;;
  *) go_on "the run has crashed ($state)" ;;
esac
