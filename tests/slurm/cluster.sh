#!/usr/bin/env bash
# Run a real Slurm cluster inside this machine, for tests.
#
# Usage:
#
#     tests/slurm/cluster.sh up [NODES]           # start node1, node2, ... (default 3), and wait until they are idle
#     tests/slurm/cluster.sh exec COMMAND...      # run a command on the head node, where slurmctld runs
#     tests/slurm/cluster.sh on NODE COMMAND...   # run a command on a node
#     tests/slurm/cluster.sh crash NODE           # cut the power of a node
#     tests/slurm/cluster.sh boot NODE            # start a crashed node again
#     tests/slurm/cluster.sh status
#     tests/slurm/cluster.sh down
#     tests/slurm/cluster.sh check                # exit with 0 if this machine can run a cluster; otherwise say why not
#
# Settings (environment variables):
#   CLUSTER_DIR   folder for configuration, logs and sockets: a short path without spaces, replaced by `up`; default
#                 /tmp/slurm-cluster
#   PROCTRACK     how Slurm tracks the processes of a job: cgroup or linuxproc; default: cgroup, if this machine supports it
#
# Requires root, and on Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2
#
# The head and the nodes run in Linux namespaces, with their own host names, addresses, mounts and process ids. The nodes'
# namespaces are nested in the head's, so killing the head's first process ends the whole cluster. The cluster has no
# connection to the outer network. All nodes share the file system of this machine.
set -euo pipefail
umask 022
self=$(readlink -f "${BASH_SOURCE[0]}")
dir=${CLUSTER_DIR:-/tmp/slurm-cluster}
export CLUSTER_DIR=$dir SLURM_CONF=$dir/slurm.conf
freezer=/sys/fs/cgroup/freezer
cgroup=$freezer/cluster${dir//\//-}
new_host=(setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc)

die() {
  echo "error: $*" >&2
  exit 1
}

check() {
  [ "$(id -u)" = 0 ] || die "a Slurm cluster for tests needs root"
  local program
  for program in slurmctld slurmd sbatch munged ip; do
    command -v "$program" >/dev/null || die "a Slurm cluster for tests needs $program; tests/slurm/cluster.sh lists the packages to install"
  done
  unshare --net --uts --mount --pid --fork --mount-proc \
    sh -c 'ip link add br0 type bridge && ip link add v1 type veth peer name eth0' 2>/dev/null ||
    die "a Slurm cluster for tests needs namespaces, bridges and veth links, which this machine does not permit"
}

up() {
  local nodes=${1:-3} unshare head
  check
  [ ! -e "$dir" ] || [ -e "$SLURM_CONF" ] || rmdir "$dir" || die "CLUSTER_DIR=$dir contains other files: use an empty folder"
  down
  rm -rf "$dir"
  configure "$nodes"
  "${new_host[@]}" "$self" _head "$nodes" </dev/null >"$dir/log/head.log" 2>&1 &
  unshare=$!
  head=$(first_process "$unshare")
  echo "$head $(readlink "/proc/$head/ns/pid")" >"$dir/pids/head"
  for _ in {1..600}; do
    kill -0 "$unshare" 2>/dev/null || die "the head node exited: $(cat "$dir/log/head.log")"
    # Check the pid file first: sinfo waits for a second if slurmctld is not running yet.
    if [ -e "$dir/pids/node$nodes" ] && [ "$("$self" exec sinfo -hN -p main -t idle | wc -l)" = "$nodes" ]; then return; fi
    sleep 0.05
  done
  die "the nodes are not idle after 30 s: $(tail "$dir"/log/*)"
}

configure() {
  local node gpu track=${PROCTRACK:-linuxproc}
  [ -n "${PROCTRACK:-}" ] || [ ! -w "$freezer/cgroup.procs" ] || track=cgroup
  mkdir -p "$dir"/{log,pids,state,spool,munge,dev,cgroup/freezer}
  mungekey --create --keyfile="$dir/munge/key"
  for gpu in 0 1; do # aliases of /dev/null, which Slurm assigns with CUDA_VISIBLE_DEVICES
    mknod "$dir/dev/gpu$gpu" c 1 3
  done
  echo "Name=gpu File=$dir/dev/gpu[0-1]" >"$dir/gres.conf"
  printf '%s\n' CgroupPlugin=cgroup/v1 "CgroupMountpoint=$dir/cgroup" >"$dir/cgroup.conf"
  {
    printf '%s\n' "127.0.0.1 localhost" "10.77.0.1 head"
    for ((node = 1; node <= $1; node++)); do # also as IPv6, because torch looks up the peer's name that way
      printf '%s\n' "10.77.0.$((10 + node)) node$node" "::ffff:10.77.0.$((10 + node)) node$node"
    done
  } >"$dir/hosts"
  cat >"$SLURM_CONF" <<EOT
ClusterName=test
SlurmctldHost=head
# a requeued job waits until its credential has expired, by default 120 s
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pids/slurmctld
SlurmdPidFile=$dir/pids/slurmd-%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# cgroup: a signal reaches only Slurm's own tasks, as on real clusters; linuxproc: also their child processes
ProctrackType=proctrack/$track
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the configured nodes are larger than this machine
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=50000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a crashed node returns to service automatically; one that was set down does not
ReturnToService=1
SlurmdTimeout=15
KillWait=10
# how long scontrol still shows a job that has ended
MinJobAge=3600
GresTypes=gpu
NodeName=node[1-$1] CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL PriorityTier=10
EOT
}

# first_process PID: print the pid of the child of `unshare`, which is process 1 of a new host.
first_process() {
  until pgrep -P "$1"; do
    kill -0 "$1" 2>/dev/null || die "a new host did not start: see $dir/log"
    sleep 0.02
  done
}

run_head() {
  hostname head
  mount --bind "$dir/hosts" /etc/hosts
  if grep -q cgroup "$SLURM_CONF"; then
    mkdir -p "$cgroup"
    mount --bind "$cgroup" "$dir/cgroup/freezer"
  fi
  ip link set lo up
  ip link add br0 type bridge
  ip addr add 10.77.0.1/24 dev br0
  ip link set br0 up
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --seed-file="$dir/munge/seed" --log-file="$dir/log/munged.log"
  slurmctld
  local node
  for ((node = 1; node <= $1; node++)); do boot "node$node"; done
  reap
}

# boot NODE: start a node; runs on the head.
boot() {
  local number=${1#node} node
  "${new_host[@]}" "$self" _node "$1" </dev/null >>"$dir/log/$1.log" 2>&1 &
  node=$(first_process $!)
  echo "$node" >"$dir/pids/$1"
  ip link delete "v$number" 2>/dev/null || true # left by a crashed node
  ip link add "v$number" type veth peer name eth0 netns "$node"
  ip link set "v$number" master br0 up
}

run_node() {
  hostname "$1"
  ip link set lo up
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip addr add "10.77.0.$((10 + ${1#node}))/24" dev eth0
  ip link set eth0 up
  mkdir -p "$dir/spool/$1"
  slurmd -N "$1"
  reap
}

# reap: act as process 1, which must reap orphaned processes.
reap() {
  sleep infinity &
  wait
}

# enter PID COMMAND...: run a command in the namespaces of a process, in the current folder.
enter() {
  exec nsenter --target="$1" --mount --uts --net --pid env --chdir="$PWD" "${@:2}"
}

on_head() {
  local head
  read -r head _ 2>/dev/null <"$dir/pids/head" || die "no cluster is up in CLUSTER_DIR=$dir"
  enter "$head" "$@"
}

down() {
  local head namespace
  read -r head namespace 2>/dev/null <"$dir/pids/head" || return 0
  if [ "$(readlink "/proc/$head/ns/pid")" = "$namespace" ]; then # the pid may have been reused
    kill -KILL "$head"
    while [ -e "/proc/$head" ]; do sleep 0.02; done
  fi
  rm "$dir/pids/head"
  [ ! -e "$cgroup" ] || find "$cgroup" -depth -type d -exec rmdir {} +
}

case ${1:-} in
  up | check | down) "$@" ;;
  exec) on_head "${@:2}" ;;
  on | crash | boot) on_head "$self" "_$1" "${@:2}" ;;
  status) on_head sh -c 'sinfo -Nl; squeue -a' ;;
  _head) run_head "$2" ;;
  _node) run_node "$2" ;;
  _on) enter "$(cat "$dir/pids/$2")" "${@:3}" ;;
  _crash) kill -KILL "$(cat "$dir/pids/$2")" ;;
  _boot) boot "$2" ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$self" >&2
    exit 2
    ;;
esac
