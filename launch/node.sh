#!/usr/bin/env bash
# One node's torchrun agent, which starts and watches its ranks. Run it once on every node of a run:
#
#     launch/node.sh [CONFIG.yaml] [key=value ...]
#
# Settings, by environment variables:
#   NPROC_PER_NODE   ranks on this node; default: its GPUs, else 1
#   NNODES           nodes of the run; default 1
#   HEAD             HOST:PORT where the nodes meet; needed with several nodes, the same on all
#   RUN_ID           a name for this start, the same on all nodes; default ddp_cifar
#   LOCAL_ADDR       the address that other nodes reach this one by; default: its host name's
#   MIN_NODES        so many nodes are enough: after half a minute they start without the rest; default NNODES
#   MAX_RESTARTS     times that the ranks are started again after a failure; default 0
#   OMP_NUM_THREADS  CPU threads a rank; default: the node's cores shared out
#   MODULE           what every rank runs; default ddp_cifar.train
#   NODE_NAME        what the preflight calls this node; default: its host name
#   LOG_DIR          an existing folder to keep torchrun's error files in; default: none are kept
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds that the ranks have to end after another has failed; default 60, 15 for the preflight
#
# Ctrl-C, SIGTERM and SIGUSR1 go to the ranks, which agree to stop, save, and end with status 0; Ctrl-C twice ends them at
# once. SIGQUIT has torchrun end them. After a failure the last line is the error of the rank that failed first, and the exit
# status is that rank's.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need_torchrun
nnodes=${NNODES:-1}
gpus=$(count_gpus)
nproc_per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
check_count NNODES "$nnodes"
check_count NPROC_PER_NODE "$nproc_per_node"
if [ "$nnodes" != 1 ]; then
  head=${HEAD:-}
  [ -n "$head" ] || refuse "NNODES=$nnodes needs HEAD=HOST:PORT, where the nodes meet, the same on all of them"
  head_host=${head%:*} head_host=${head_host#[} head_host=${head_host%]}
  getent ahosts "$head_host" >/dev/null || # `getent hosts` would ask for the name of an address
    refuse "$(hostname) finds no address for $head_host, where the nodes are to meet: mend HEAD=$head, /etc/hosts or the DNS"
  [ -n "${LOCAL_ADDR:-}" ] || getent ahosts "$(hostname)" >/dev/null ||
    refuse "this node's own name, $(hostname), leads to no address, by which the other nodes would reach it: mend /etc/hosts or the DNS, or set LOCAL_ADDR and GLOO_SOCKET_IFNAME"
fi

# torchrun would give each rank one thread
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc_per_node ? cores / nproc_per_node : 1))}
# without it restarted ranks read the addresses of the dead ones, and fail or hang
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
patience=60
[ "${MODULE:-}" != ddp_cifar.preflight ] || patience=15 # it reports a rank that is stopped, and has nothing to save
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$patience}

log_dir=$(mktemp -d "${LOG_DIR:-${TMPDIR:-/tmp}}/launch-XXXXXX") # of this start alone
flags=(--nnodes="${MIN_NODES:-$nnodes}:$nnodes" --nproc-per-node="$nproc_per_node" --max-restarts="${MAX_RESTARTS:-0}" --log-dir="$log_dir")
if [ "$nnodes" = 1 ]; then
  flags+=(--standalone)
else
  flags+=(--rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-ddp_cifar}")
fi
[ -z "${LOCAL_ADDR:-}" ] || flags+=(--local-addr="$LOCAL_ADDR")

# pass_on SIGNAL: to the ranks, torchrun's children, rather than to torchrun, which would end with status 1 and after a while
# kill them; before there are any, torchrun is ended.
# shellcheck disable=SC2329 # by the traps
pass_on() {
  local ranks=() before=${interrupted:-}
  interrupted=$1
  agent=${agent:-${!:-}} # it may have come just after the start
  if [ -z "$agent" ]; then exit 1; fi
  find_ranks
  if [ ${#ranks[@]} = 0 ] && [ "${MAX_RESTARTS:-0}" = 0 ] && [ "$before" != INT ] && were_started; then
    sleep 0.3 # they come just now
    find_ranks
    [ ${#ranks[@]} -gt 0 ] || return 0 # or have ended, as torchrun will, by itself
  fi
  [ ${#ranks[@]} = 0 ] || kill -s "$1" "${ranks[@]}" 2>/dev/null || true
  # after a second Ctrl-C the ranks end with an error, after which torchrun might start them again
  if [ ${#ranks[@]} = 0 ] || [ "$before" = INT ]; then
    kill -TERM "$agent" 2>/dev/null || true
  elif [ "${MAX_RESTARTS:-0}" != 0 ] && [ "$1" != USR1 ]; then
    end_when_replaced "${ranks[@]}" &
  fi
}

# find_ranks: sets `ranks` to their pids.
# shellcheck disable=SC2329 # by pass_on
find_ranks() {
  read -ra ranks -d '' < <(cat "/proc/$agent/task/"*/children 2>/dev/null) || true
  [ ${#ranks[@]} -gt 0 ] || read -ra ranks -d '' < <(pgrep -P "$agent" 2>/dev/null) || true
}

# were_started: torchrun has made the folders of its ranks.
# shellcheck disable=SC2329 # by pass_on
were_started() {
  compgen -G "$log_dir/*/attempt_*/*" >/dev/null
}

# end_when_replaced RANK...: ranks that were still importing torch die of the signal; torchrun shall not start others for them.
# shellcheck disable=SC2329 # by pass_on
end_when_replaced() {
  local pause=0 # in turns of 0.2 s
  while kill -0 "$agent" 2>/dev/null; do
    sleep 0.2
    pause=$((pause - 1))
    if [ "$pause" -gt 0 ] || kill -0 "$@" 2>/dev/null; then continue; fi
    if [ "$(pgrep -P "$agent" | wc -l)" -ge $# ]; then
      sleep 0.3 # torchrun ends those that it knows of, once all are started
      kill -TERM "$agent" 2>/dev/null || true
      pause=25 # another signal, when it is about to end, would kill it
    fi
  done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
trap 'pass_on USR1' USR1
trap 'interrupted=1; kill -TERM "${agent:-${!:-$$}}" 2>/dev/null || true' QUIT

# In a process group of its own (-m), so that Ctrl-C comes once, from here. SIGUSR1 would end torchrun, and leave its ranks.
set -m
(
  trap '' USR1
  exec torchrun "${flags[@]}" -m "${MODULE:-ddp_cifar.train}" "$@"
) &
agent=$!
set +m
wait_for "$agent" && status=0 || status=$?

[ "$status" = 0 ] || repeat_error "$log_dir"
[ -n "${LOG_DIR:-}" ] || rm -rf "$log_dir"
exit "$status"
