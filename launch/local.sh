#!/usr/bin/env bash
# Start a run on this machine.
#
# Usage:
#
#     launch/local.sh [CONFIG.yaml] [key=value ...]
#     NPROC_PER_NODE=4 launch/local.sh configs/demo.yaml       # four ranks
#     NNODES=2 NPROC_PER_NODE=2 launch/local.sh ...            # simulate two nodes: two torchrun agents on loopback
#
# NPROC_PER_NODE, OMP_NUM_THREADS, MODULE and MAX_RESTARTS work as in node.sh. Ctrl-C saves and stops the run. A second
# Ctrl-C terminates it immediately. With several nodes, each output line is prefixed with its node, and if one node fails,
# all nodes shut down. After a failure, the last line is the error of the rank that failed first.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

nnodes=${NNODES:-1}
check_count NNODES "$nnodes"
if [ "$nnodes" = 1 ]; then
  exec "$here/node.sh" "$@"
fi

LOG_DIR=$(mktemp -d)
trap 'rm -rf "$LOG_DIR"' EXIT
export LOG_DIR
# If there are enough GPUs, each simulated node gets its own.
gpus=$(count_gpus)
per_node=$((gpus / nnodes))
export NPROC_PER_NODE=${NPROC_PER_NODE:-$((per_node > 0 ? per_node : 1))}
check_count NPROC_PER_NODE "$NPROC_PER_NODE"
all_gpus=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}
ranks=$((nnodes * NPROC_PER_NODE)) cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
# Everything stays on loopback, because the host name may resolve to another address or to none.
export HEAD="127.0.0.1:$((20000 + $$ % 10000))" RUN_ID="local-$$" LOCAL_ADDR=127.0.0.1
export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo

nodes=()
signal_all() { kill -s "$1" "${nodes[@]}" 2>/dev/null || true; }
trap 'interrupted=1; signal_all INT' INT
trap 'interrupted=1; signal_all TERM' TERM HUP
trap 'interrupted=1; signal_all USR1' USR1
trap 'interrupted=1; signal_all USR2' QUIT USR2
set -m # otherwise background processes ignore SIGINT, and the nodes could not forward Ctrl-C
for ((node = 0; node < nnodes; node++)); do
  if [ "$NPROC_PER_NODE" -le "$per_node" ]; then
    first=$((node * NPROC_PER_NODE + 1))
    CUDA_VISIBLE_DEVICES=$(cut -d, -f "$first-$((first + NPROC_PER_NODE - 1))" <<<"$all_gpus")
    export CUDA_VISIBLE_DEVICES
  fi
  "$here/node.sh" "$@" > >(trap '' INT TERM && exec sed -u "s/^/[node $node] /") 2>&1 &
  nodes+=($!)
done
set +m
[ -z "${interrupted:-}" ] || signal_all TERM # a signal arrived while the nodes were starting
status=0 running=$nnodes
while [ "$running" -gt 0 ]; do
  wait -n && exit_status=0 || exit_status=$?
  before=$running running=$(jobs -rp | wc -l)
  if [ "$running" = "$before" ]; then continue; fi # a signal interrupted the wait; it was already forwarded
  if [ "$status" = 0 ] && [ "$exit_status" != 0 ]; then
    status=$exit_status
    # The other nodes would wait for the failed one. In a preflight they must continue, because they report it.
    [ "${MODULE:-}" = ddp_cifar.preflight ] || signal_all USR2 # not QUIT, which a background job of a script ignores
  fi
done
for node in "${nodes[@]}"; do # two nodes may have exited at the same time
  wait_for "$node" && exit_status=0 || exit_status=$?
  [ "$status" != 0 ] || status=$exit_status
done
[ "$status" = 0 ] || { sleep 0.2; repeat_error "$LOG_DIR"; } || true
exit "$status"
