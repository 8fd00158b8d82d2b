# shellcheck shell=bash
# Shared by the scripts of this folder; sourced, not run.

slurm=$(dirname "${BASH_SOURCE[0]}")
srun_options=()
# shellcheck disable=SC1091 # a site's own, if there is one
[ ! -e "$slurm/site.sh" ] || source "$slurm/site.sh"
# shellcheck source=launch/common.sh
source "$slurm/../launch/common.sh"
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"

# is_by_hand ARGUMENT...: they have the form that submits, even where this shell is in a job, as notebooks are.
is_by_hand() {
  local argument
  for argument in "$@"; do
    [ "$argument" != -- ] || return 0
  done
  return 1
}

# take_place: what the nodes of this job need to meet. Sets `job`, its number for people and for scontrol.
take_place() {
  local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
  job=$SLURM_JOB_ID
  # an array's last task has the array's own number as SLURM_JOB_ID
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  gpus=${gpus##*:}
  [ -n "$gpus" ] || gpus=$(count_gpus)
  export NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
  check_count NPROC_PER_NODE "$NPROC_PER_NODE"
  # they meet on the first of them; another job there has another number
  HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):$((20000 + SLURM_JOB_ID % 10000))
  export HEAD NNODES=$SLURM_NNODES RUN_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  # sbatch's --cpus-per-task does not reach srun by itself
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

# start_nodes LOG_DIR ARGUMENT...: launch/node.sh on every node of the job, in the background; sets `step` to srun's pid. The
# ranks of all nodes leave their errors in LOG_DIR, which is made.
start_nodes() {
  rm -rf "$1" # a start whose node was lost has left it
  mkdir -p "$1"
  export LOG_DIR=$1
  shift
  # shellcheck disable=SC2016 # the node's own, which Slurm sets there
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --export=ALL --label \
    --kill-on-bad-exit="${kill_on_bad_exit:-1}" "${srun_options[@]}" \
    bash -c 'NODE_NAME=$SLURMD_NODENAME exec "$0" "$@"' "$checkout/launch/node.sh" "$@" </dev/null &
  # shellcheck disable=SC2034 # for who called
  step=$!
  [ -z "${asked:-}" ] || kill -USR1 "$step" # it came just before
}

# finish_nodes: wait for them; sets `status` to 0, or to that of the rank that failed first, whose error is repeated.
finish_nodes() {
  wait_for "$step" && status=0 || status=$?
  [ "$status" = 0 ] || repeat_error "$LOG_DIR"
  rm -rf "$LOG_DIR"
}

# run_module MODULE ARGUMENT...: that module on every node of this job, to its end; exits with its status.
run_module() {
  export MODULE=$1
  shift
  trap 'rm -rf "$LOG_DIR"' EXIT
  start_nodes "$PWD/.${MODULE##*.}-$job" "$@"
  finish_nodes
  exit "$status"
}

# describe_job RUN_DIR START: what this job is, how to follow it, how to stop it.
describe_job() {
  local log cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
  log=$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p' | sed -n 1p)
  cat <<END
job $job, $2. Nodes: $NNODES ($SLURM_JOB_NODELIST), which meet at $HEAD; ranks on each: $NPROC_PER_NODE; cores: $cores.
run_dir: $1. To follow: ${log:+tail -f }${log:-this terminal}. To stop: touch $1/STOP (saves and ends), or scancel --batch --signal=USR1 $job
(saves and is requeued), or scancel $job (ends; what is not saved within Slurm's KillWait is lost).
END
  if [ "$cores" -lt "$NPROC_PER_NODE" ]; then
    echo "warning: fewer cores ($cores) than ranks ($NPROC_PER_NODE) on a node: sbatch --cpus-per-task=N or --exclusive gives more" >&2
  fi
}

# look ARGUMENT...: train --dry-run for the job; by srun where that is what has python, as in a container.
look() {
  local by_srun=()
  [ ${#srun_options[@]} = 0 ] || by_srun=(srun --nodes=1 --ntasks=1 --export=ALL "${srun_options[@]}")
  "${by_srun[@]}" python -m ddp_cifar.train --dry-run --nodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "$@" </dev/null
}

# look_and_submit SCRIPT [SBATCH_OPTION ...] -- [ARGUMENT ...]: train --dry-run, then sbatch.
look_and_submit() {
  local script=$1
  shift
  split_options "$@"
  look_before_the_queue
  sbatch "${options[@]}" "$script" "${arguments[@]}"
}

# split_options [SBATCH_OPTION ...] -- [ARGUMENT ...]: sets `options` and `arguments`, and by the options `nodes`, `ranks` (of each
# node) and `task` (the first of an array). Makes the folder of the job's log, without which the job would fail without a word.
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
    refuse "expected [sbatch options] -- [CONFIG.yaml] [key=value ...]: put -- before the arguments of the run"
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
  [[ ! $total =~ ^[1-9][0-9]*$ ]] || ranks=$(((total + nodes - 1) / nodes))
  ranks=${NPROC_PER_NODE:-$ranks}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || ranks=1
  for value in "${paths[@]}"; do
    [[ $value == /* ]] || value=$folder$value
    [[ ${value%/*} != *%* ]] || refuse "${value%/*} has a % in the name of a folder, which must be there before the job: name one"
    mkdir -p "$(dirname "$value")"
  done
}

# look_before_the_queue: train --dry-run, here, for what split_options has found.
look_before_the_queue() {
  if ! command -v torchrun >/dev/null; then
    [ ${#srun_options[@]} != 0 ] || refuse "torchrun is not on PATH: set up the environment in slurm/site.sh, or make one with \`make install\`"
    echo "the run is not looked at before it is queued, as torchrun is in the job's container only" >&2
    return
  fi
  python -m ddp_cifar.train --dry-run --nodes "$nodes" --nproc-per-node "$ranks" "${arguments[@]//%a/${task:-%a}}"
}
