#!/usr/bin/env bash
# Run benchmarks/hooks.py on two ranks in two network namespaces, connected by a link of RATE (as tc has it; default 1gbit):
#
#     benchmarks/slow_link.sh [RATE] [option of hooks.py ...]
#
# Needs root, iproute2 and the kernel's tbf queue. Uses 16 images per rank.
set -euo pipefail
rate=${1:-1gbit}
[ $# = 0 ] || shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
names=("ddp$$a" "ddp$$b")
# shellcheck disable=SC2317,SC2329 # called by the trap
cleanup() {
  for name in "${names[@]}"; do
    ip netns pids "$name" 2>/dev/null | xargs -r kill 2>/dev/null || true
    ip netns del "$name" 2>/dev/null || true
  done
}
trap cleanup EXIT
for name in "${names[@]}"; do ip netns add "$name"; done
ip link add "link$$" netns "${names[0]}" type veth peer name "link$$" netns "${names[1]}"
for i in 0 1; do
  in=(ip netns exec "${names[i]}")
  "${in[@]}" ip address add "10.77.0.$((i + 1))/24" dev "link$$"
  "${in[@]}" ip link set "link$$" up
  "${in[@]}" ip link set lo up
  "${in[@]}" tc qdisc add dev "link$$" root tbf rate "$rate" burst 256kb latency 50ms
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME="link$$"
ranks=()
for i in 0 1; do
  ip netns exec "${names[i]}" torchrun --nnodes=2 --node-rank="$i" --nproc-per-node=1 --master-addr=10.77.0.1 \
    --master-port=29511 "$here/hooks.py" --batch 16 "$@" &
  ranks+=($!)
done
status=0
for rank in "${ranks[@]}"; do wait "$rank" || status=$?; done
exit "$status"
