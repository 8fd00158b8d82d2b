# shellcheck shell=bash
# Functions shared by the Slurm scripts. Source this file; do not run it.

slurm=$(dirname "${BASH_SOURCE[0]}")
srun_options=()
# shellcheck disable=SC1091 # optional settings of this site
[ ! -e "$slurm/site.sh" ] || source "$slurm/site.sh"
# shellcheck source=launch/common.sh
source "$slurm/../launch/common.sh"
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"

# is_submission ARGUMENT...: true if the arguments contain --, as in the form that submits a job. A shell inside a job, such
# as a notebook's, may submit other jobs.
is_submission() {
  local argument
  for argument in "$@"; do
    [ "$argument" != -- ] || return 0
  done
  return 1
}

# set_up_rendezvous: export what the nodes of this job need to find each other. Sets `job`, the job id for messages and for
# scontrol.
set_up_rendezvous() {
  local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
  job=$SLURM_JOB_ID
  # In the last task of an array, SLURM_JOB_ID is the id of the whole array.
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  gpus=${gpus##*:}
  [ -n "$gpus" ] || gpus=$(count_gpus)
  export NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
  check_count NPROC_PER_NODE "$NPROC_PER_NODE"
  export GPUS_PER_NODE=$gpus
  # srun does not inherit --cpus-per-task from sbatch.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  mapfile -t job_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  use_nodes "${job_nodes[@]}"
}

# use_nodes NODE...: the next start_nodes uses these nodes. The rendezvous is on the first one. Its port depends on the job and on
# the number of starts, so that it is free.
starts=0 again=()
use_nodes() {
  chosen=("$@")
  # --overlap: Slurm may still count an earlier start as running
  [ "$*" = "${job_nodes[*]}" ] && [ "$starts" = 0 ] || again=(--overlap --nodelist="$(IFS=, && echo "$*")")
  HEAD=$1:$((20000 + (SLURM_JOB_ID + 7919 * starts) % 10000))
  export HEAD NNODES=$# RUN_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$starts"
}

# start_nodes LOG_DIR ARGUMENT...: run launch/node.sh on the chosen nodes, in the background. Sets `step` to srun's pid.
# Creates LOG_DIR, in which the ranks of all nodes leave their errors.
start_nodes() {
  rm -rf "$1" # left by an earlier start that lost its node
  mkdir -p "$1"
  export LOG_DIR=$1
  shift
  starts=$((starts + 1))
  work=$(mktemp -d)
  mkfifo "$work/errors"
  copy_errors <"$work/errors" &
  copier=$!
  # shellcheck disable=SC2016 # expanded on the node, where Slurm sets the variable
  srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 "${again[@]}" --export=ALL --label --no-kill \
    --kill-on-bad-exit="${kill_on_bad_exit:-1}" "${srun_options[@]}" \
    bash -c 'NODE_NAME=$SLURMD_NODENAME exec "$0" "$@"' "$checkout/launch/node.sh" "$@" </dev/null 2>"$work/errors" &
  # shellcheck disable=SC2034 # used by the caller
  step=$!
  [ -z "${asked:-}" ] || kill -USR1 "$step" # the signal arrived just before the start
}

# start_guards: run slurm/guard.sh on up to three other nodes of a batch job.
start_guards() {
  local others
  [ -n "${SLURMD_NODENAME:-}" ] && [ ${#job_nodes[@]} -gt 1 ] || return 0
  mapfile -t others < <(printf '%s\n' "${job_nodes[@]}" | grep -vx "$SLURMD_NODENAME" | sed -n 1,3p)
  srun --nodes="${#others[@]}" --ntasks="${#others[@]}" --ntasks-per-node=1 --nodelist="$(IFS=, && echo "${others[*]}")" --overlap \
    --no-kill --export=ALL "$slurm/guard.sh" "$job" "$SLURMD_NODENAME" </dev/null &
}

# copy_errors: copy standard input to standard error. Creates $work/exited when srun reports that a task has exited.
copy_errors() {
  local line
  trap '' INT TERM HUP USR1
  while IFS= read -r line || [ -n "$line" ]; do
    printf '%s\n' "$line" >&2 || true # srun needs a reader, also if the disk of the job's log is full
    [[ $line != "srun: error: "*": task"* ]] || : >"$work/exited" || true
  done
}

# finish_nodes: wait for the nodes. Sets `status` to 0, or prints the error of the rank that failed first and sets `status` to
# that rank's exit status. Sets `lost` to the nodes that do not answer.
finish_nodes() {
  local since=''
  lost=()
  while kill -0 "$step" 2>/dev/null; do
    [ -n "$since" ] || [ ! -e "$work/exited" ] || since=$SECONDS
    if [ -n "$since" ] && [ $((SECONDS - since)) -ge 3 ]; then
      # srun would wait for a lost node until Slurm notices, after SlurmdTimeout (300 s by default)
      check_nodes "${chosen[@]}"
      if [ ${#silent[@]} -gt 0 ]; then
        # shellcheck disable=SC2034 # used by the caller
        lost=("${silent[@]}")
        wait_for_exits "${ready[@]}" "${unfit[@]}"
        kill -KILL "$step" 2>/dev/null || true
      fi
      since=$SECONDS
    fi
    sleep 1 &
    wait $! || true
  done
  wait_for "$step" 2>/dev/null && status=0 || status=$?
  wait_for "$copier" || true
  rm -rf "$work"
  [ "$status" = 0 ] || [ ${#lost[@]} -gt 0 ] || repeat_error "$LOG_DIR" || true
}

# wait_for_exits NODE...: wait until launch/node.sh has exited on these nodes, for up to 40 s: Slurm kills them after KillWait.
wait_for_exits() {
  local until=$((SECONDS + 40)) node
  for node in "$@"; do
    while [ "$SECONDS" -lt "$until" ] && [ ! -e "$LOG_DIR/exited-$node" ]; do
      : >"$LOG_DIR/look" && rm "$LOG_DIR/look" # a changed folder is read anew, also over NFS
      sleep 0.5
    done
  done
}

# check_nodes NODE...: run launch/check_node.sh on each, at the same time. Sets `ready`, `unfit` (with the reasons in `reasons`), and
# `silent`: the nodes that do not answer within 10 s.
# shellcheck disable=SC2034 # used by the caller
declare -A reasons=()
# shellcheck disable=SC2034
check_nodes() {
  local node pipe answer line
  local -A pipes=() # not files: the disk of this node may be full
  ready=() unfit=() silent=()
  for node in "$@"; do
    exec {pipe}< <(timeout -k 1 10 srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --no-kill --quiet --export=ALL \
      "$checkout/launch/check_node.sh" "$run_dir" 2>/dev/null </dev/null)
    pipes[$node]=$pipe
  done
  for node in "$@"; do
    answer='' pipe=${pipes[$node]}
    while IFS= read -r -t 12 line <&"$pipe"; do answer=$line; done
    exec {pipe}<&-
    case $answer in
      ready) ready+=("$node") ;;
      '') silent+=("$node") ;;
      *) unfit+=("$node") reasons[$node]=$answer ;;
    esac
  done
}

# run_module MODULE ARGUMENT...: run the module on every node of this job, and exit with its status.
run_module() {
  export MODULE=$1
  shift
  run_dir=$PWD
  trap 'rm -rf "$LOG_DIR"' EXIT
  start_nodes "$PWD/.${MODULE##*.}-$job" "$@"
  finish_nodes
  exit "$status"
}

# describe_job RUN_DIR START: print the job's nodes and ranks, how to follow it, and how to stop it.
describe_job() {
  local log stop cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
  printf -v stop '%q' "$1/STOP"
  log=$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p' | sed -n 1p)
  cat <<END
job $job: $2
nodes: $NNODES ($SLURM_JOB_NODELIST), rendezvous at $HEAD; per node: $NPROC_PER_NODE ranks, $cores cores
run_dir: $1
to follow: ${log:+tail -f }${log:-this terminal}
to stop: touch $stop (saves, then ends the job), scancel --batch --signal=USR1 $job (saves, then requeues the job),
  or scancel $job (ends the job; progress not saved within Slurm's KillWait is lost)
END
  if [ "$cores" -lt "$NPROC_PER_NODE" ]; then
    echo "warning: fewer cores ($cores) than ranks ($NPROC_PER_NODE) per node: request more with sbatch --cpus-per-task=N or --exclusive" >&2
  fi
}

# dry_run_in_job ARGUMENT...: train --dry-run with the size of this job. Uses srun if srun_options are set, because then Python
# may exist only in srun's container.
dry_run_in_job() {
  local by_srun=()
  [ ${#srun_options[@]} = 0 ] || by_srun=(srun --nodes=1 --ntasks=1 --export=ALL "${srun_options[@]}")
  "${by_srun[@]}" python -m ddp_cifar.train --dry-run --nodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "$@" </dev/null
}

# check_and_submit SCRIPT [SBATCH_OPTION ...] -- [ARGUMENT ...]: train --dry-run, then sbatch.
check_and_submit() {
  local script=$1
  shift
  split_options "$@"
  dry_run_before_submitting
  sbatch "${options[@]}" "$script" "${arguments[@]}"
}

# split_options [SBATCH_OPTION ...] -- [ARGUMENT ...]: sets `options` and `arguments`. Reads `nodes` (without SPARE_NODES), `ranks` (per node) and
# `task` (the first task of an array) from the options. Creates the folder of the job's log: without it, Slurm would fail the
# job without a message.
split_options() {
  local option value folder='' paths=() total=''
  options=() arguments=() nodes=1 ranks=1 task=''
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  if [ $# -gt 0 ]; then
    arguments=("${@:2}")
  elif [[ " ${options[*]-}" == *" -"* ]]; then
    user_error "expected [sbatch options] -- [CONFIG.yaml] [key=value ...]: put -- between sbatch's options and the run's arguments"
  else
    arguments=("${options[@]}") options=()
  fi
  set -- "${options[@]}"
  while [ $# -gt 0 ]; do
    option=$1
    case $option in
      --*=*) value=${option#*=} ;;
      -[a-zA-Z]?*) value=${option:2} ;;
      *) value=${2:-} ;;
    esac
    case $option in
      --nodes | --nodes=* | -N*) nodes=${value%%[-,]*} ;;
      --gpus-per-node | --gpus-per-node=*) ranks=${value##*:} ;;
      --gpus | --gpus=* | -G*) total=${value##*:} ;;
      --gres | --gres=*) [[ ! ,$value, =~ ,gpu:([^,:]*:)?([0-9]+), ]] || ranks=${BASH_REMATCH[2]} ;;
      --array | --array=* | -a*) task=${value%%[-,:%]*} ;;
      --output | --output=* | -o* | --error | --error=* | -e*) paths+=("$value") ;;
      --chdir | --chdir=* | -D*) folder=$value/ ;;
    esac
    shift
  done
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || nodes=1
  [[ ! ${SPARE_NODES:-} =~ ^[0-9]+$ ]] || [ "$SPARE_NODES" -ge "$nodes" ] || nodes=$((nodes - SPARE_NODES))
  [[ ! $total =~ ^[1-9][0-9]*$ ]] || ranks=$(((total + nodes - 1) / nodes))
  ranks=${NPROC_PER_NODE:-$ranks}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || ranks=1
  for value in "${paths[@]}"; do
    [[ $value == /* ]] || value=$folder$value
    [[ ${value%/*} != *%* ]] ||
      user_error "the log folder ${value%/*} contains a % pattern, but it must exist before the job starts: use a fixed folder name"
    mkdir -p "$(dirname "$value")"
  done
}

# dry_run_before_submitting: train --dry-run on this machine, with the values that split_options has set.
dry_run_before_submitting() {
  if ! command -v torchrun >/dev/null; then
    [ ${#srun_options[@]} != 0 ] || user_error "torchrun is not on PATH: set up the environment of ddp_cifar in slurm/site.sh (in a checkout, \`make install\` creates one)"
    echo "skipping the dry run before submission: torchrun exists only in the job's container" >&2
    return
  fi
  python -m ddp_cifar.train --dry-run --nodes "$nodes" --nproc-per-node "$ranks" "${arguments[@]//%a/${task:-%a}}"
}
