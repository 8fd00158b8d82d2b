#!/usr/bin/env bash
# Check whether one or more machines are ready for a run. Use the same settings and arguments as for the run.
#
# Usage:
#
#     launch/preflight.sh [CONFIG.yaml] [key=value ...]                                 # like launch/local.sh
#     HEAD=node1:29500 NNODES=2 launch/preflight.sh [CONFIG.yaml] [key=value ...]       # on each node, like launch/node.sh
#     MODULE=ddp_cifar.preflight launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...] # on all hosts of a file
#
# Options of `python -m ddp_cifar.preflight`, such as --json FILE, are accepted too. docs/diagnosing.md explains the checks.
# The preflight waits 30 s for nodes. It then continues without the missing ones and reports their names.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
export MODULE=ddp_cifar.preflight MIN_NODES=1
script=local.sh
[ -z "${HEAD:-}" ] || script=node.sh
exec "$here/$script" --nodes "${NNODES:-1}" "$@"
