#!/usr/bin/env bash
# Requeue a job whose script is gone because the script's node is lost; cancel it if it cannot be requeued, as in a chain.
# slurm/train.sh runs this on some other nodes of the job.
#
# Usage:
#
#     slurm/guard.sh JOB NODE
#
# With --no-kill, Slurm removes a lost node from the job. If that was the node of the script, nothing would run until the time
# limit.
set -euo pipefail
trap '' USR1 # a request to the run
job=$1 script_node=$2
while :; do
  sleep 10
  nodes=$(scontrol show job "$job" | sed -n 's/^ *NodeList=//p') || continue # the controller may be busy
  if [ -n "$nodes" ] && ! scontrol show hostnames "$nodes" | grep -qx "$script_node"; then
    echo "job $job: $script_node, the node of the script, is lost; requeuing the job" || true # its log may be on a full disk
    scontrol requeue "$job" || scancel "$job" || continue
    exit
  fi
done
