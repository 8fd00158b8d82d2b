#!/usr/bin/env bash
# Start one node's torchrun agent, which starts and monitors the node's ranks. Run it once on every node.
#
# Usage:
#
#     launch/node.sh [CONFIG.yaml] [key=value ...]
#
# Settings (environment variables):
#   NPROC_PER_NODE   ranks on this node; default: its number of GPUs, or 1 without GPUs
#   NNODES           number of nodes of the run; default 1
#   HEAD             rendezvous address HOST:PORT; required with several nodes, with the same value on every node
#   RUN_ID           rendezvous id of this start, the same on every node; default ddp_cifar
#   LOCAL_ADDR       the address by which other nodes reach this one; default: the address of its host name
#   MIN_NODES        train with this many nodes at least; default NNODES. The run starts if no other node joins for 5 seconds
#   (preflight: 30), and starts again, up to MAX_RESTARTS times, if a node is lost or joins
#   MAX_RESTARTS     how often torchrun restarts the ranks after a failure; default 0
#   OMP_NUM_THREADS  CPU threads per rank; default: the node's cores divided among its ranks
#   MODULE           the Python module that every rank runs; default ddp_cifar.train
#   NODE_NAME        the name of this node in the preflight's report; default: its host name
#   LOG_DIR          an existing folder in which to keep torchrun's error files; default: they are removed
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds that ranks have to exit after another rank failed; default 60 (preflight: 15)
#   (always 30 with torch before 2.12, whose torchrun has no such setting)
#
# Ctrl-C, SIGTERM and SIGUSR1 are forwarded to the ranks, which save, stop after the same step, and exit with status 0. A
# second Ctrl-C terminates them immediately. On SIGUSR2 or SIGQUIT, torchrun shuts the ranks down. After a failure, the last line is
# the error of the rank that failed first, and the exit status is that rank's exit status.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need_torchrun
nnodes=${NNODES:-1}
gpus=$(count_gpus)
nproc_per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
check_count NNODES "$nnodes"
check_count NPROC_PER_NODE "$nproc_per_node"
min_nodes=${MIN_NODES:-$nnodes}
check_count MIN_NODES "$min_nodes"
[ "$min_nodes" -le "$nnodes" ] || user_error "MIN_NODES=$min_nodes is invalid: expected at most NNODES=$nnodes"
if [ "$nnodes" != 1 ]; then
  head=${HEAD:-}
  [ -n "$head" ] ||
    user_error "NNODES=$nnodes requires HEAD=HOST:PORT, the rendezvous address: set the same value on every node"
  head_host=${head%:*} head_host=${head_host#[} head_host=${head_host%]}
  getent ahosts "$head_host" >/dev/null || # not `getent hosts`, which fails for an address without a name
    user_error "$(hostname) cannot resolve the rendezvous host $head_host: fix HEAD=$head, /etc/hosts or DNS"
  taken=$(python -m ddp_cifar.distributed.ports "$head" 2>/dev/null) || [ -z "$taken" ] || user_error "${taken##*$'\n'}"
  [ -n "${LOCAL_ADDR:-}" ] || getent ahosts "$(hostname)" >/dev/null ||
    user_error "the host name of this node, $(hostname), does not resolve, so other nodes cannot reach it: fix /etc/hosts or DNS, or set LOCAL_ADDR and GLOO_SOCKET_IFNAME"
fi

# torchrun's default is one thread per rank
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc_per_node ? cores / nproc_per_node : 1))}
# rank 0's store has a connection to every rank
open_files=$(ulimit -Sn)
[ "$open_files" = unlimited ] || [ "$open_files" -ge 65536 ] || ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
# With a shared store, restarted ranks read the addresses of the previous ranks, and fail or hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
shutdown_timeout=60
[ "${MODULE:-}" != ddp_cifar.preflight ] || shutdown_timeout=15 # a preflight has nothing to save
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$shutdown_timeout}

[ -z "${LOG_DIR:-}" ] || is_part=1
log_dir=$(mktemp -d "${LOG_DIR:-${TMPDIR:-/tmp}}/launch-XXXXXX") # used by this start only
flags=(--nnodes="$min_nodes:$nnodes" --nproc-per-node="$nproc_per_node" --max-restarts="${MAX_RESTARTS:-0}" --log-dir="$log_dir")
if [ "$nnodes" = 1 ]; then
  flags+=(--standalone)
else
  flags+=(--rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-ddp_cifar}")
fi
if [ "$min_nodes" != "$nnodes" ]; then
  # torchrun's defaults are 30 s, and 15 s until a node counts as lost
  wait_s=5
  [ "${MODULE:-}" != ddp_cifar.preflight ] || wait_s=30
  flags+=(--rdzv-conf="last_call_timeout=$wait_s,keep_alive_interval=2,keep_alive_max_attempt=3")
fi
[ -z "${LOCAL_ADDR:-}" ] || flags+=(--local-addr="$LOCAL_ADDR")

# Ranks that are not ready for signals yet read the earlier ones from this file (ddp_cifar/run/stopping.py).
export DDP_CIFAR_SIGNALS=$log_dir/signals

# forward_signal SIGNAL: send it to the ranks (torchrun's children). torchrun itself would exit with status 1 and kill the
# ranks after a timeout. torchrun is terminated only if no rank was started yet, or after a second Ctrl-C.
# shellcheck disable=SC2329 # called by the traps
forward_signal() {
  local ranks=() before=${interrupted:-}
  interrupted=$1
  { echo "$1" >>"$DDP_CIFAR_SIGNALS"; } 2>/dev/null || true # the disk may be full, or the folder removed
  agent=${agent:-${!:-}} # the signal may arrive before agent=$! below
  if [ -z "$agent" ]; then exit 1; fi
  read -ra ranks -d '' < <(cat "/proc/$agent/task/"*/children 2>/dev/null) || true
  [ ${#ranks[@]} -gt 0 ] || read -ra ranks -d '' < <(pgrep -P "$agent" 2>/dev/null) || true
  note_death
  [ ${#ranks[@]} = 0 ] || kill -s "$1" "${ranks[@]}" 2>/dev/null || true
  if [ "$before" = INT ] || { [ ${#ranks[@]} = 0 ] && ! ranks_were_started; }; then
    kill -TERM "$agent" 2>/dev/null || true
  fi
}

# note_death: the first time, set `died` to yes or no: whether a rank of this node has died so far. Called before a signal is
# forwarded, as ranks that die after one, such as Slurm's when another node has failed, are not this node's fault.
# shellcheck disable=SC2329 # called by forward_signal
note_death() {
  [ -n "${NODE_NAME:-}" ] && [ -z "$died" ] || return 0
  died_without_error "$log_dir" && died=yes || died=no
}
died=''

# ranks_were_started: true if torchrun has created log folders for ranks, which are then starting, running or finished.
# shellcheck disable=SC2329 # called by forward_signal
ranks_were_started() {
  compgen -G "$log_dir/*/attempt_*/*" >/dev/null
}
trap 'forward_signal INT' INT
trap 'forward_signal TERM' TERM HUP
trap 'forward_signal USR1' USR1
trap 'interrupted=1; note_death; kill -TERM "${agent:-${!:-$$}}" 2>/dev/null || true' QUIT USR2

# wait_for_ranks: wait until no rank is left, as they may save. Kills those that are stopped, and all after 30 s: torchrun
# leaves them behind if it is killed, or gets a signal while it waits for them.
wait_for_ranks() {
  local try pid pids state left
  for ((try = 1; try <= 60; try++)); do
    left=''
    mapfile -t pids < <(grep -lzs "^TORCHELASTIC_ERROR_FILE=$log_dir/.*/error.json" /proc/[0-9]*/environ | cut -d / -f 3)
    for pid in "${pids[@]}"; do
      state=$(sed 's/.*) //; s/ .*//' "/proc/$pid/stat" 2>/dev/null || true)
      case $state in
        '' | Z | X) continue ;;
        T | t) kill -KILL "$pid" 2>/dev/null || true ;;
        *) [ "$try" != 60 ] || kill -KILL "$pid" 2>/dev/null || true ;;
      esac
      left=1
    done
    [ -n "$left" ] || return 0
    sleep 0.5
  done
}

# A separate process group (-m), so that Ctrl-C reaches torchrun only through this script. torchrun must ignore SIGUSR1,
# which would terminate it and leave its ranks running.
set -m
(
  trap '' USR1
  TORCHELASTIC_ERROR_FILE=$log_dir/agent.json exec torchrun "${flags[@]}" -m "${MODULE:-ddp_cifar.train}" "$@"
) &
agent=$!
set +m
wait_for "$agent" && status=0 || status=$?
[ "$status" = 0 ] || wait_for_ranks

# ranks that end a job for good exit with 0, so that torchrun does not restart them
[ "$status" = 0 ] && [ -z "$(find "$log_dir" -name error.final -print -quit 2>/dev/null)" ] || repeat_error "$log_dir" || true
if [ -z "${LOG_DIR:-}" ]; then
  rm -rf "$log_dir"
elif [ -n "${NODE_NAME:-}" ]; then
  [ "$status" = 0 ] || note_death
  [ "$status" = 0 ] || [ "$died" = no ] || : >"$LOG_DIR/died-$NODE_NAME" || true
  : >"$LOG_DIR/exited-$NODE_NAME" || true
fi
exit "$status"
