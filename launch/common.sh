# shellcheck shell=bash
# Shared by the scripts of this folder; sourced, not run.

# The project's own environment, where none is active.
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! command -v torchrun >/dev/null && [ -x "$checkout/.venv/bin/torchrun" ]; then
  PATH="$checkout/.venv/bin:$PATH"
fi

# wait_for PID: wait until it has ended, through the signals that this shell traps meanwhile; its status.
wait_for() {
  local status
  while :; do
    wait "$1" && status=0 || status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# repeat_error DIR: the line of the rank that failed first, from what the ranks left under torchrun's log folder; sets `status`
# to that rank's exit status, which torchrun made 1 of.
repeat_error() {
  local first
  first=$(find "$1" -name error.txt -printf '%T@ %p\n' 2>/dev/null | sort -n | sed -n 1p | cut -d ' ' -f 2-)
  # after a signal ranks may end with errors that say no more than that; but not with a mistake, or a failed save
  if [ -n "$first" ] && { [ -z "${interrupted:-}" ] || [ "$(cat "${first%.txt}.status")" != 1 ]; }; then
    cat "$first" >&2
    # shellcheck disable=SC2034 # for who called
    status=$(cat "${first%.txt}.status")
  elif [ -n "${interrupted:-}" ]; then
    echo "error: interrupted" >&2
  else
    echo "error: a process ended without a word (killed, or not started): torchrun's report above names it" >&2
  fi
}

# need_torchrun: refuse to go on without it.
need_torchrun() {
  command -v torchrun >/dev/null || refuse "torchrun is not on PATH: activate the environment, or make one with \`make install\`"
}

# refuse MESSAGE: end with an error, which is left where repeat_error finds it, and status 2.
refuse() {
  local place
  echo "error: $1" >&2
  if [ -n "${LOG_DIR:-}" ]; then
    place=$(mktemp -d "$LOG_DIR/refused-XXXXXX")
    echo 2 >"$place/error.status"
    echo "[$(hostname)] error: $1" >"$place/error.txt"
  fi
  exit 2
}

# check_count NAME VALUE: refuse what is not a whole number from 1 on.
check_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || refuse "$1=$2 is not a count: expected a whole number from 1 on"
}

# count_gpus: how many this node has, or CUDA_VISIBLE_DEVICES shows.
count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}
