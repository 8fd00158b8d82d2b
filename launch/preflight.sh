#!/usr/bin/env bash
# Is this machine, or are these machines, fit for a run? Start it as the run will be, with its arguments:
#
#     launch/preflight.sh [CONFIG.yaml] [key=value ...]                                 # as launch/local.sh
#     HEAD=node1:29500 NNODES=2 launch/preflight.sh [CONFIG.yaml] [key=value ...]       # on each machine, as launch/node.sh
#     MODULE=ddp_cifar.preflight launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...] # on all hosts of a file
#
# Options of `python -m ddp_cifar.preflight`, such as --json FILE, may stand among them; docs/diagnosing.md explains what it finds.
# It waits half a minute for nodes, and then goes on without those that have not come, which it names.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
export MODULE=ddp_cifar.preflight MIN_NODES=1
start=local.sh
[ -z "${HEAD:-}" ] || start=node.sh
exec "$here/$start" --nodes "${NNODES:-1}" "$@"
