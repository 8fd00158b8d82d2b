#!/usr/bin/env bash
#SBATCH --job-name=ddp_cifar
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --wait-all-nodes=1
#
# Train on a Slurm cluster.
#
# Usage:
#
#     sbatch [sbatch options] slurm/train.sh [CONFIG.yaml] [key=value ...]
#     slurm/train.sh [sbatch options] -- [CONFIG.yaml] [key=value ...]
#
# The second form checks the run first (train --dry-run), so that a typo fails before the job waits in the queue. It then
# submits the job with sbatch. Typical options: --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=8:00:00.
#
# The default run_dir is runs/JOB_NAME-JOB_ID. It stays the same when the job is requeued. Two minutes before the time
# limit, and on preemption, the run saves and stops; the job is requeued and resumes. After a crash or a lost node, the run
# starts again at once on the nodes that the job still has, from its last completed step. The job is requeued only if too
# few are left, or if the node of this script is lost. A user error or an error of the training itself ends the job.
#
# In an array job, %a in the arguments is replaced by the task id, as in seed=%a. @FILE is replaced by arguments from FILE, which
# slurm/sweep.sh writes: each is ended by a NUL byte, and an empty one ends the arguments of a task, from task 1 on.
#
# Settings (environment variables):
#   MAX_REQUEUES     how often the job may be requeued; default 20
#   MIN_NODES        requeue the job if fewer of its nodes are left; default 1
#   SPARE_NODES      nodes of the job that replace lost ones, and are idle until then; default 0
#   NPROC_PER_NODE   ranks per node; default: the job's GPUs per node, or 1 without GPUs
#   OMP_NUM_THREADS, MAX_RESTARTS, LOCAL_ADDR   as in launch/node.sh
# Put the settings of your site (modules, environment, network interfaces) into slurm/site.sh; see slurm/README.md.
set -euo pipefail
step='' asked='' ended=''
# Sent by Slurm before the time limit: save, stop and requeue. srun forwards it to the nodes.
trap 'asked=1 interrupted=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' USR1
# Sent by Slurm when it cancels, preempts or requeues the job, or at the time limit. Slurm also signals the nodes itself.
trap 'ended=1 interrupted=1' TERM
here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -e "$here/job.sh" ]; then # Slurm runs a copy of this file from its spool folder
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p' | sed -n 1p)
  [ -e "$script" ] || script=${script%%.sh *}.sh # the line also holds the arguments
  here=$(dirname "$(readlink -f "$script")")
  [ -e "$here/job.sh" ] || here=$SLURM_SUBMIT_DIR/slurm
fi
# shellcheck source=slurm/job.sh
source "$here/job.sh"

if [ -z "${SLURM_JOB_ID:-}" ] || is_submission "$@"; then
  check_and_submit "$here/train.sh" "$@"
  exit
fi
set_up_rendezvous

given=()
for argument in "$@"; do
  if [[ $argument == @* ]]; then
    file=${argument#@} task=${SLURM_ARRAY_TASK_ID:-1} arguments=()
    [ ! -f "$file" ] || for ((i = 0; i < task; i++)); do read_arguments || break; done <"$file"
    [ ${#arguments[@]} -gt 0 ] || user_error "$argument: expected a file with the arguments of task $task (see slurm/sweep.sh)"
    given+=("${arguments[@]}")
  else
    given+=("${argument//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
  fi
done
arguments=("${given[@]}")
run_dir=runs/$SLURM_JOB_NAME-$job
requeues=${SLURM_RESTART_COUNT:-0} max_requeues=${MAX_REQUEUES:-20}
for argument in "${arguments[@]}"; do
  case $argument in
    run_dir=*) run_dir=${argument#run_dir=} ;;
    resume=never) [ "$requeues" = 0 ] || arguments+=(resume=auto) ;; # it applies only to the first start
  esac
done
[[ $run_dir != "~"/* ]] || run_dir=$HOME${run_dir#"~"} # as the config does
[[ $run_dir != -* ]] || run_dir=./$run_dir # otherwise programs would read it as an option
arguments+=("run_dir=$run_dir")
# shellcheck disable=SC2016 # an OmegaConf interpolation, not a shell variable
[[ $run_dir != *'${'* ]] || user_error "run_dir=$run_dir: expected a folder name without \${...}"
[[ $max_requeues =~ ^[0-9]+$ ]] || user_error "MAX_REQUEUES=$max_requeues is invalid: expected 0 or a positive integer"
min_nodes=${MIN_NODES:-1} spare_nodes=${SPARE_NODES:-0}
unset MIN_NODES # launch/node.sh has its own: here, each start has a fixed number of nodes
check_count MIN_NODES "$min_nodes"
[[ $spare_nodes =~ ^[0-9]+$ ]] && [ "$spare_nodes" -lt "${#job_nodes[@]}" ] ||
  user_error "SPARE_NODES=$spare_nodes is invalid: expected 0 to $((${#job_nodes[@]} - 1)), since the job has ${#job_nodes[@]} nodes"
[ "$min_nodes" -le $((${#job_nodes[@]} - spare_nodes)) ] ||
  user_error "MIN_NODES=$min_nodes is invalid: the run has $((${#job_nodes[@]} - spare_nodes)) nodes (SPARE_NODES=$spare_nodes)"
bad_nodes=$run_dir/bad_nodes deaths=$run_dir/logs/deaths-$job

# requeue REASON: requeue the job, so that the run resumes. In a chain, leave that to the next job.
requeue() {
  local try how="to resume, submit it again with run_dir=$run_dir"
  if [ -n "${DDP_CIFAR_CHAIN:-}" ]; then
    if [ -n "$(squeue --noheader --name="$SLURM_JOB_NAME" --states=PENDING)" ]; then
      say "job $job: $1; the next job of the chain resumes it"
      exit 0
    fi
    echo "error: $1, and this was the last job of the chain; to resume, submit another chain with run_dir=$run_dir" >&2
    exit 1
  fi
  if [ "$requeues" -ge "$max_requeues" ]; then
    echo "error: $1, and the job was already requeued $requeues times (MAX_REQUEUES); $how" >&2
    exit 1
  fi
  find_excluded
  if [ "$available" -lt "$min_nodes" ]; then
    echo "error: $1, and partition $SLURM_JOB_PARTITION has only $available other nodes (MIN_NODES=$min_nodes); $how" >&2
    exit 1
  fi
  say "job $job: $1; requeuing the job"
  trap '' TERM # sent by scontrol requeue
  for try in 1 2 3; do
    scontrol requeue "$job" && { exclude_bad_nodes && exit 0; }
    sleep $((10 * try)) # the controller may be busy, or failing over to its backup
  done
  echo "error: $1, and Slurm did not requeue the job (see above); $how, or use slurm/chain.sh" >&2
  exit 1
}

# find_excluded: set `excluded` to the nodes that a requeued job must not use, and `available` to the number of other nodes of the
# partition. Slurm itself does not use a node that does not answer.
find_excluded() {
  local all
  excluded=$(sed -n '/ does not answer$/!s/ .*//p' "$bad_nodes" 2>/dev/null | sort -u | paste -sd,) || true
  available=${#job_nodes[@]}
  [ -n "$excluded" ] && all=$(sinfo --noheader --partition="$SLURM_JOB_PARTITION" --Node --format=%N | sort -u) || return 0
  available=$(grep -cvxF "${excluded//,/$'\n'}" <<<"$all") || true
}

# exclude_bad_nodes: let Slurm start the requeued job on other nodes, if the partition has enough. A job can be changed only while
# it is pending: after `scontrol requeue`, while Slurm ends this script.
exclude_bad_nodes() {
  local before
  [ -n "$excluded" ] && [ "$available" -ge "${#job_nodes[@]}" ] || return 0
  say "job $job: excluding $excluded"
  before=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ (]*\).*/\1/p')
  for _ in {1..50}; do
    ! scontrol update jobid="$job" ExcNodeList="${before:+$before,}$excluded" 2>/dev/null || return 0
    sleep 0.2
  done
}

# note_bad NODE REASON: do not use this node again in this job.
note_bad() {
  ! is_bad "$1" || return 0
  echo "$1 $2" >>"$bad_nodes" || true
  say "job $job: $1 is not used again: it $2"
}
is_bad() { grep -qs "^$1 " "$bad_nodes"; }

# list_usable: set `usable` to the nodes of the job that are not bad.
list_usable() {
  local node
  usable=()
  for node in "${job_nodes[@]}"; do
    is_bad "$node" || usable+=("$node")
  done
}

# choose_nodes: choose the nodes of the next start. False if there are too few.
choose_nodes() {
  list_usable
  [ ${#usable[@]} -ge "$min_nodes" ] && use_nodes "${usable[@]:0:${#job_nodes[@]}-spare_nodes}"
}

deadly='was the node of two ranks that died'
# find_bad_nodes: find out which nodes must not be used again, after a crash.
find_bad_nodes() {
  local node
  for node in "${lost[@]}"; do note_bad "$node" "does not answer"; done
  for node in "${job_nodes[@]}"; do
    [ ! -e "$LOG_DIR/died-$node" ] || echo "$node" >>"$deaths" || true
    [ "$(sed -n "/^$node\$/p" "$deaths" 2>/dev/null | wc -l)" -lt 2 ] || note_bad "$node" "$deadly"
  done
  list_usable
  if [ ${#usable[@]} = 0 ] && grep -qs " $deadly\$" "$bad_nodes"; then
    say "job $job: ranks have died on all nodes, so the nodes are not the cause: they are used again"
    sed -i "/ $deadly\$/d" "$bad_nodes" || true
    rm -f "$deaths" || true
    list_usable
  fi
  check_nodes "${usable[@]}"
  for node in "${silent[@]}"; do note_bad "$node" "does not answer"; done
  for node in "${unfit[@]}"; do note_bad "$node" "is not ready: ${reasons[$node]}"; done
}

# end_job [MESSAGE]: exit without a requeue, and cancel the rest of a chain. With MESSAGE, print it and exit with status 0.
end_job() {
  [ $# = 0 ] || { status=0 && say "job $job: $1"; }
  [ -z "${DDP_CIFAR_CHAIN:-}" ] || scancel --name="$SLURM_JOB_NAME" --state=PENDING || true
  exit "$status"
}

# stop_by_hand: Ctrl-C in an interactive allocation (salloc). The second Ctrl-C does not wait for a save.
# shellcheck disable=SC2329 # called by the trap
stop_by_hand() {
  local signal=USR1
  [ -z "$ended" ] || signal=TERM
  ended=1 interrupted=1
  [ -z "$step" ] || kill -s "$signal" "$step" 2>/dev/null || true
}
trap stop_by_hand INT HUP
if [ "$requeues" = 0 ]; then
  rm -f "$bad_nodes" "$deaths"
elif [ -e "$bad_nodes" ]; then
  sed -i '/ does not answer$/d' "$bad_nodes" # Slurm allocates only nodes that answer
fi
choose_nodes || requeue "only ${#usable[@]} of its nodes can be used"
describe_job "$run_dir" "start $((requeues + 1)), $((max_requeues - requeues)) requeues left"

status=0
if [ "$requeues" = 0 ]; then
  dry_run_in_job "${arguments[@]}" || status=$?
  [ "$status" = 0 ] || [ -n "$asked$ended" ] || end_job # the dry run has printed the reason
  status=0
fi
start_guards
# The run writes its status file when it starts to train. An unchanged file is from an earlier start.
status_stamp() { stat --format='%i %y' "$run_dir/status" 2>/dev/null || true; }
state='never started'
while [ -z "$asked$ended" ]; do
  before=$(status_stamp) known=$(cat "$bad_nodes" 2>/dev/null || true) state='never started'
  start_nodes "$run_dir/logs/start-$job" "${arguments[@]}"
  finish_nodes
  if [ "$(status_stamp)" != "$before" ]; then
    state=$(cat "$run_dir/status")
    rm -f "$run_dir/logs/never-started-$job" || true
  fi
  [ -z "$asked$ended" ] && [ "$status" != 3 ] || break # 3: the disk is full or read-only, and $state may be old
  case $state in
    running) ;;
    'never started') [ ${#lost[@]} -gt 0 ] || break ;;
    failed*) [ "$(cat "$bad_nodes" 2>/dev/null || true)" != "$known" ] || break ;; # it has named a bad node
    *) break ;;
  esac
  find_bad_nodes
  choose_nodes || { state="crashed, and ${#usable[@]} of the job's ${#job_nodes[@]} nodes can be used" && break; }
  say "job $job: the run crashed; starting again on $NNODES of its ${#job_nodes[@]} nodes ($(IFS=, && echo "${chosen[*]}"))"
done
rm -rf "$run_dir/logs/start-$job" || true
case $ended,$status,$state in
  1,*)
    say "job $job: ended by Slurm or by the user; this script does not requeue it. Run status: $state"
    exit "$status"
    ;;
  ,3,* | ,*,failed*) end_job ;; # a failed save or a failed run; its error is printed above
  # The run writes these after its last save, so a process that is killed later changes nothing.
  ,*,"stopped: the file STOP"* | ,*,"stopped: train.deadline"*)
    end_job "the run $state; to resume, submit it again with run_dir=$run_dir"
    ;;
  ,*,stopped* | ,*,crashed*) requeue "the run $state" ;;
  ,*,finished) end_job "the run $state" ;;
  ,*,"never started")
    # First start: a user error that the dry run could not find. Later: the lock of a lost node, or a node without the
    # environment. These may be temporary, so requeue once.
    if [ -z "$asked" ]; then
      [ "$status,$requeues" != 2,0 ] || end_job
      [ ! -e "$run_dir/logs/never-started-$job" ] || end_job
      touch "$run_dir/logs/never-started-$job" || end_job
    fi
    requeue "the run did not start"
    ;;
  *) requeue "the run crashed (status: $state)" ;;
esac
