#!/usr/bin/env bash
# Check in a second whether this node can run ranks. Prints "ready", or why it cannot, and exits with 1 then.
#
# Usage:
#
#     launch/check_node.sh RUN_DIR
#
# Checks that RUN_DIR can be written, and that NPROC_PER_NODE NVIDIA GPUs respond if the job has GPUs (GPUS_PER_NODE is not 0).
# slurm/train.sh and launch/ssh.sh run it on each node before they start a run again. launch/preflight.sh checks far more.
set -euo pipefail

fail() {
  echo "$1"
  exit 1
}

file=$(mktemp "$1/.check-XXXXXX" 2>/dev/null) || fail "cannot write to $1"
rm "$file"
if [ "${GPUS_PER_NODE:-0}" != 0 ] && command -v nvidia-smi >/dev/null; then
  gpus=$(timeout 5 nvidia-smi --query-gpu=uuid --format=csv,noheader 2>/dev/null | grep -c '^GPU') || true
  [ "${gpus:-0}" -ge "${NPROC_PER_NODE:-1}" ] || fail "has ${gpus:-0} GPUs that respond, expected ${NPROC_PER_NODE:-1}"
fi
echo ready
