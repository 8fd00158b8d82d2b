# shellcheck shell=bash
# Functions shared by the launch scripts. Source this file; do not run it.

# Use the project's virtual environment if no environment is active.
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! command -v torchrun >/dev/null && [ -x "$checkout/.venv/bin/torchrun" ]; then
  PATH="$checkout/.venv/bin:$PATH"
fi

# wait_for PID: wait until the process has exited, and return its exit status. A trapped signal does not end the wait.
wait_for() {
  local status
  while :; do
    wait "$1" && status=0 || status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# repeat_error DIR: print the error of the rank that failed first, read from torchrun's log folder DIR. Sets `status` to
# that rank's exit status, because torchrun itself exits with 1 for every failure. Call it with `|| true`: the folder may be
# removed, and the output may be on a full disk.
repeat_error() {
  local first run_dir reason=''
  first=$(find "$1" -name error.final -print -quit 2>/dev/null)
  if [ -n "$first" ]; then
    first=${first%.final}.txt
  else
    first=$(find "$1" -name error.txt -printf '%T@ %p\n' 2>/dev/null | sort -n | sed -n 1p | cut -d ' ' -f 2-)
  fi
  run_dir=$(find "$1" -name run_dir -print -quit 2>/dev/null)
  # a user error (2) says everything itself, and a node of several leaves this to the script that has started it
  if [ -n "$run_dir" ] && [ -z "${interrupted:-}${is_part:-}" ] && [ "$(cat "${first%.txt}.status" 2>/dev/null)" != 2 ]; then
    python -m ddp_cifar.diagnose "$(cat "$run_dir")" 2>/dev/null | sed -n '2,6p' >&2 || true
  fi
  # After a signal, errors with status 1 only echo the signal. User errors (2) and failed saves (3) are still reported.
  if [ -n "$first" ] && { [ -z "${interrupted:-}" ] || [ "$(cat "${first%.txt}.status")" != 1 ]; }; then
    cat "$first" >&2
    # shellcheck disable=SC2034 # used by the caller
    status=$(cat "${first%.txt}.status")
  elif [ -n "${interrupted:-}" ]; then
    echo "error: interrupted" >&2
  else
    reason=$(first_line_of_error "$1/agent.json")
    [ -n "$reason" ] || reason="a process exited without an error message (killed, or failed to start); see torchrun's report above"
    echo "error: $reason" >&2
  fi
}

# first_line_of_error FILE: print the first line of an error that torch has recorded in the file, if it exists.
first_line_of_error() {
  [ ! -e "$1" ] || python -c 'import json, sys
print("torchrun:", json.load(open(sys.argv[1]))["message"]["message"].splitlines()[0])' "$1" 2>/dev/null || true
}

# died_without_error DIR: true if a rank of the last start in torchrun's log folder DIR was killed: it no longer runs, and left
# neither an error, nor the note that another rank was lost.
died_without_error() {
  local folder attempt
  attempt=$(find "$1" -path '*/attempt_*' -prune -name 'attempt_*' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-)
  [ -n "$attempt" ] || return 1
  for folder in "$attempt"/*/; do
    [ -e "$folder/error.txt" ] || [ -e "$folder/lost_peer" ] ||
      grep -qzsx "TORCHELASTIC_ERROR_FILE=${folder}error.json" /proc/[0-9]*/environ || return 0
  done
  return 1
}

# say MESSAGE: print it. A full disk under the output does not end the script, which has more to do.
say() { echo "$1" || true; }

# read_arguments: read arguments from standard input up to an empty one, each ended by a NUL byte. Sets `arguments`. False if
# there are no more.
read_arguments() {
  local argument
  arguments=()
  while IFS= read -r -d '' argument; do
    [ -n "$argument" ] || return 0
    arguments+=("$argument")
  done
  return 1
}

# need_torchrun: fail if torchrun is not on PATH.
need_torchrun() {
  command -v torchrun >/dev/null ||
    user_error "torchrun is not on PATH: activate the environment of ddp_cifar (in a checkout, \`make install\` creates one)"
}

# user_error MESSAGE: print the error, leave it where repeat_error finds it, and exit with status 2.
user_error() {
  local folder
  echo "error: $1" >&2
  if [ -n "${LOG_DIR:-}" ]; then
    folder=$(mktemp -d "$LOG_DIR/user-error-XXXXXX")
    echo 2 >"$folder/error.status"
    echo "[$(hostname)] error: $1" >"$folder/error.txt"
  fi
  exit 2
}

# check_count NAME VALUE: fail unless VALUE is a positive integer.
check_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || user_error "$1=$2 is invalid: expected a positive integer"
}

# count_gpus: print the number of GPUs of this node, or of those in CUDA_VISIBLE_DEVICES if it is set.
count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}
