#!/usr/bin/env bash
# Run launch/node.sh in a pod of the Job in job.yaml, which starts this script.
#
# Usage:
#
#     launch/kubernetes/pod.sh [CONFIG.yaml] [key=value ...] run_dir=DIR
#
# Pod 0 first checks the run (train --dry-run) and waits until all pods are up. The others wait for the rendezvous on pod 0.
# They wait here, without a time limit, because torchrun waits only ten minutes and pods may be pending for hours.
#
# Settings (environment variables):
#   JOB_COMPLETION_INDEX   the number of this pod; set by Kubernetes
#   NNODES                 number of pods
#   SERVICE                name of the headless Service; it resolves to the addresses of all pods that are up
#   HEAD                   rendezvous address: the name of pod 0 and a port
#   LOCAL_ADDR             address of this pod. With addresses instead of names, no rank uses an outdated DNS record of a replaced pod
#   CHECK_EVERY_S          seconds between checks of the rendezvous during the run; default 10. After six failed ones, the pod ends
#   NPROC_PER_NODE, OMP_NUM_THREADS, MAX_RESTARTS   as in launch/node.sh
#
# Exit status, for the policies in job.yaml:
#   0    the run is finished, or was stopped by the file STOP or by its time limit
#   2    user error
#   75   a signal stopped the run, as when a node is drained; the next start resumes
#   other values: the run failed, or lost a pod
# launch/node.sh exits with 0 when a signal has stopped it. Kubernetes would count such a pod as succeeded, and not replace it.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
STOPPED=75
trap 'exit $STOPPED' TERM

run_dir=''
for argument in "$@"; do
  case $argument in run_dir=*) run_dir=${argument#run_dir=} ;; esac
done
[[ $run_dir != "~"/* ]] || run_dir=$HOME${run_dir#"~"} # as the config does
[ -n "$run_dir" ] || user_error "set run_dir=DIR, a folder on a volume that all pods share: the default is lost with its pod"
for name in JOB_COMPLETION_INDEX NNODES SERVICE HEAD LOCAL_ADDR; do
  [ -n "${!name:-}" ] || user_error "$name is not set: this script runs in the pods of launch/kubernetes/job.yaml"
done
gpus=$(count_gpus)
export NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# addresses_of NAME: print the addresses of the name, one per line.
addresses_of() {
  { getent ahosts "$1" || true; } | cut -d ' ' -f 1 | sort -u
}

# is_open ADDRESS PORT: true if something accepts connections there.
is_open() {
  timeout 3 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null
}

port=${HEAD##*:}
if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
  python -m ddp_cifar.train --dry-run --nodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "$@"
  echo "waiting until $NNODES pods are up"
  until [ "$(addresses_of "$SERVICE" | wc -l)" -ge "$NNODES" ]; do sleep 2; done
  export HEAD=localhost:$port # torchrun opens the rendezvous here, even if the DNS still has the pod that this one replaces
else
  echo "waiting for the rendezvous on $HEAD"
  until
    address=$(addresses_of "${HEAD%:*}" | sed -n 1p)
    [ -n "$address" ] && is_open "$address" "$port"
  do sleep 2; done
  export HEAD=$address:$port
  [[ $address != *:* ]] || export HEAD="[$address]:$port" # IPv6
fi

"$(dirname "${BASH_SOURCE[0]}")/../node.sh" "$@" &
node=$! terminated=''
trap 'terminated=1; kill -TERM "$node" 2>/dev/null || true' TERM

# If the node of pod 0 is lost without closing its connections, torchrun waits for the rendezvous until TCP gives up, for about
# 15 minutes. End this pod instead: the exit of its first process kills all others.
if [ "$JOB_COMPLETION_INDEX" != 0 ]; then
  trap 'echo "error: the rendezvous on $HEAD does not respond" >&2; exit 1' USR1
  (
    failures=0
    while [ "$failures" -lt 6 ]; do
      sleep "${CHECK_EVERY_S:-10}"
      if is_open "$address" "$port"; then failures=0; else failures=$((failures + 1)); fi
    done
    kill -USR1 $$
  ) &
fi
wait_for "$node" && status=0 || status=$?

state=$(cat "$run_dir/status" 2>/dev/null || true)
case $status,$state in
  0,"stopped: SIG"*) ;;
  0,finished | 0,stopped*) exit 0 ;;
  0,*) status=1 ;; # a rank on another pod did not reach the end
esac
if [ "$status" = 0 ] || [ -n "$terminated" ]; then
  echo "the run is not finished (status: ${state:-none}); the next start resumes it"
  exit $STOPPED
fi
exit "$status"
