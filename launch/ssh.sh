#!/usr/bin/env bash
# Start one run on several hosts over ssh, without a scheduler.
#
# Usage:
#
#     launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...]
#     MODULE=ddp_cifar.preflight launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...]
#
# HOSTS_FILE lists one host per line, as ssh accepts it: user@host, or a name from ~/.ssh/config. # starts a comment. ssh
# must not ask for a password.
#
# The script first checks every host: it is reachable, it has the same scripts and package, an environment and the data (train
# --dry-run). It then starts launch/node.sh on every host, with the rendezvous on the first one. Each output line is
# prefixed with its host. Ctrl-C saves and stops the run. A second Ctrl-C terminates it immediately. If the connection to a
# host is lost, that host shuts down its own ranks, and the script shuts down the other hosts. After a failure, the last
# line is the error of the host that failed first, and the exit status is that host's exit status.
#
# Settings (environment variables, passed on to every host):
#   NPROC_PER_NODE, OMP_NUM_THREADS, MAX_RESTARTS, MODULE   as in launch/node.sh
#   MIN_NODES        if the run crashes or loses a host, start it again on the hosts that answer, if there are so many
#   NCCL_*, GLOO_*, TORCH_*   passed on unchanged
#   CHECKOUT         the folder of the checkout, or of the copied scripts, on the hosts; default: the same path as here
#   SETUP            a command to run first on each host, such as "source ~/venv/bin/activate"
#   HEAD             rendezvous address HOST:PORT: the first host, by a name or address that the others can reach
#   SSH              the ssh command; default ssh
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

hosts_file=${1:-}
[ -f "$hosts_file" ] ||
  user_error "no such hosts file: ${hosts_file:-(none given)}; use launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...]"
shift
mapfile -t hosts < <(sed -E 's/#.*//; s/^[[:space:]]+//; s/[[:space:]]+$//; /^$/d' "$hosts_file")
[ ${#hosts[@]} -gt 0 ] || user_error "$hosts_file lists no hosts: expected one host per line"
for host in "${hosts[@]}"; do
  [[ $host != *[[:space:]]* ]] ||
    user_error "$hosts_file has the line '$host': expected only a host; set the number of ranks with NPROC_PER_NODE"
  [[ $host =~ ^[[:alnum:]_][]@[:alnum:]:._%[-]*$ ]] ||
    user_error "$hosts_file has the line $(printf %q "$host"): expected a host of letters, digits and . - _, or USER@HOST"
done
duplicates=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)
[ -z "$duplicates" ] || user_error "$hosts_file lists $duplicates twice: list each host once"

folder=${CHECKOUT:-$checkout}
first=${hosts[0]#*@}
export NNODES=${#hosts[@]} RUN_ID="ssh-$$" HEAD=${HEAD:-$first:$((20000 + $$ % 10000))}
[ "$NNODES" = 1 ] || case ${HEAD%:*} in localhost | 127.*)
  user_error "HEAD=$HEAD is a loopback address: set HEAD=HOST:PORT to a name or address of the first host that the others can reach"
  ;;
esac
module=${MODULE:-ddp_cifar.train}
min_nodes=${MIN_NODES:-}
unset MIN_NODES # launch/node.sh has its own: here, each start has a fixed number of hosts
[ -z "$min_nodes" ] || check_count MIN_NODES "$min_nodes"
if [ "$module" = ddp_cifar.preflight ]; then
  export MIN_NODES=1
  set -- --nodes "$NNODES" --hosts "$(IFS=, && echo "${hosts[*]#*@}")" "$@"
fi
read -ra connect <<<"${SSH:-ssh}"
CHECK_TIMEOUT_S=180 # Python may need a minute to start from a slow file system
connect+=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3)

# run_on HOST SCRIPT [SECONDS]: run a bash script on the host, in its checkout, with the settings. SECONDS is a time limit.
run_on() {
  local script settings
  settings=$(env | grep -E '^(NPROC_PER_NODE|OMP_NUM_THREADS|MAX_RESTARTS|MODULE|NNODES|MIN_NODES|RUN_ID|HEAD|NCCL_.*|GLOO_.*|TORCH_.*)=' |
    while IFS= read -r line; do printf 'export %s=%q; ' "${line%%=*}" "${line#*=}"; done)
  printf -v script 'export NODE_NAME=%q; %s cd %q 2>/dev/null || { echo no checkout at %q: set CHECKOUT; exit 2; }; %s %s' \
    "${1#*@}" "$settings" "$folder" "$folder" "${SETUP:-:};" "$2"
  # base64, so that any login shell passes the script to bash unchanged
  ${3:+timeout -k 1 "$3"} "${connect[@]}" "$1" "exec bash -c 'eval \"\$(echo $(base64 <<<"$script" | tr -d '\n') | base64 -d)\"'"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
quoted=$(printf '%q ' "$@")

# -- check each host
# shellcheck disable=SC2016 # expanded on the host
check='source launch/common.sh
command -v torchrun >/dev/null || { echo "torchrun is not on PATH: set SETUP to the command that activates the environment (in a checkout, make install creates one)"; exit 2; }
package=$(python -c "import ddp_cifar; print(ddp_cifar.__path__[0])") || { echo "ddp_cifar is not installed in the environment"; exit 2; }
checksums() { (cd "$1" && find . -name "*.py" -o -name "*.sh" -o -name "*.yaml" | LC_ALL=C sort | xargs sha256sum); }
echo "files $(for part in launch "$package" configs; do [ ! -d "$part" ] || checksums "$part"; done | sha256sum | cut -c 1-12)"'
if [ "$module" = ddp_cifar.train ]; then
  check+="; ranks=\${NPROC_PER_NODE:-\$(count_gpus)}; [ \"\$ranks\" -gt 0 ] || ranks=1
python -m ddp_cifar.train --dry-run --nodes $NNODES --nproc-per-node \"\$ranks\" $quoted 2>&1"
  # the folder that another start needs
  [ -z "$min_nodes" ] || check+=" || exit
echo \"files run_dir \$(python -m ddp_cifar.train --print-config $quoted | sed -n 's/^run_dir: //p')\""
fi
trap 'kill $(jobs -p) 2>/dev/null || true; exit 130' INT TERM
for i in "${!hosts[@]}"; do
  {
    run_on "${hosts[i]}" "$check" "$CHECK_TIMEOUT_S" </dev/null >"$work/check-$i" 2>&1 && echo 0 || echo $?
  } >"$work/check-status-$i" &
done
wait
bad=0 files=$(sed -n 's/^files //p' "$work/check-0" | sed -n 1p) run_dir=$(sed -n 's/^files run_dir //p' "$work/check-0")
for i in "${!hosts[@]}"; do
  check_status=$(cat "$work/check-status-$i") found=$(sed -n 's/^files //p' "$work/check-$i" | sed -n 1p)
  reason=$(tail -n 1 "$work/check-$i")
  if [ "$check_status" = 124 ] || [ "$check_status" = 137 ]; then
    echo "error: ${hosts[i]} did not respond within $CHECK_TIMEOUT_S s; check whether one of its file systems hangs" >&2
  elif [ "$check_status" = 255 ]; then
    echo "error: ${hosts[i]} cannot be reached by ssh (${reason:-no answer})" >&2
  elif [ "$check_status" != 0 ]; then
    echo "error: ${hosts[i]}: ${reason:-exit status $check_status}" >&2
  elif [ -n "$files" ] && [ "$found" != "$files" ]; then
    echo "error: ddp_cifar or $folder differs between ${hosts[i]} (${found}) and ${hosts[0]} ($files): check out the same commit, or install the same version, on both" >&2
  else
    continue
  fi
  bad=$((bad + 1))
done
[ "$bad" = 0 ] || user_error "$bad of ${#hosts[@]} hosts are not ready (see above); nothing was started"
sed '/^files /d' "$work/check-0"

# -- start
# The standard input of each connection is a control channel: launch/remote.sh stops its node if it is closed or silent for 30 s.
nodes=() channels=()
# shellcheck disable=SC2329 # called by the traps
signal_hosts() {
  local channel
  interrupted=1
  for channel in "${channels[@]}"; do echo "$1" >&"$channel" || true; done 2>/dev/null
}
trap '' PIPE
trap 'signal_hosts INT' INT
trap 'signal_hosts TERM' TERM HUP
trap 'signal_hosts USR1' USR1
trap 'signal_hosts USR2' QUIT

# start_hosts: run launch/node.sh on the hosts `active`, numbers into `hosts`, and wait until all have exited. Sets `status`, and
# `failed` to the host that failed first.
start_hosts() {
  local i channel left running exit_status
  nodes=() channels=() status=0 failed=''
  for i in "${active[@]}"; do
    mkfifo "$work/channel-$start-$i"
    (
      trap '' INT # Ctrl-C reaches the host only through its channel
      for channel in "${channels[@]}"; do exec {channel}>&-; done
      run_on "${hosts[i]}" "launch/remote.sh $quoted" <"$work/channel-$start-$i"
    ) > >(trap '' INT TERM && exec tee "$work/output-$i" | sed -u "s/^/[${hosts[i]}] /") 2>&1 &
    nodes[i]=$!
    exec {channel}>"$work/channel-$start-$i"
    channels[i]=$channel
  done
  [ -z "${interrupted:-}" ] || signal_hosts TERM # a signal arrived while the hosts were starting
  running=("${active[@]}")
  while [ ${#running[@]} -gt 0 ]; do
    left=()
    for i in "${running[@]}"; do
      if kill -0 "${nodes[i]}" 2>/dev/null; then
        { echo . >&"${channels[i]}" || true; } 2>/dev/null
        left+=("$i")
        continue
      fi
      wait_for "${nodes[i]}" && exit_status=0 || exit_status=$?
      if [ "$exit_status" != 0 ] && [ "$status" = 0 ]; then
        status=$exit_status failed=$i
        # The other hosts would wait for the failed one. In a preflight they must continue, because they report it.
        if [ "$module" != ddp_cifar.preflight ]; then
          for channel in "${channels[@]}"; do echo USR2 >&"$channel" || true; done 2>/dev/null
        fi
      fi
    done
    running=("${left[@]}")
    [ ${#running[@]} = 0 ] || sleep 0.5 || true
  done
  for channel in "${channels[@]}"; do exec {channel}>&-; done
}

# crashed: true if the run has crashed or lost a host, so that another start resumes it. Sets `active` to the hosts that answer and
# can write to run_dir.
crashed() {
  local i ready=() answers=()
  [ "$status" = 1 ] || [ "$status" = 255 ] || return 1
  for i in "${active[@]}"; do
    run_on "${hosts[i]}" "launch/check_node.sh $(printf %q "$run_dir") && cat $(printf %q "$run_dir/status")" 20 \
      </dev/null >"$work/answer-$i" 2>&1 &
    answers+=($!)
  done
  wait "${answers[@]}" || true
  for i in "${active[@]}"; do
    [ "$(sed -n 1p "$work/answer-$i")" != ready ] || ready+=("$i")
  done
  [ ${#ready[@]} -ge "$min_nodes" ] && [ "$(sed -n 2p "$work/answer-${ready[0]}")" = running ] || return 1
  active=("${ready[@]}")
}

active=("${!hosts[@]}") start=1 port=${HEAD##*:}
start_hosts
while [ -n "$min_nodes" ] && [ -z "${interrupted:-}" ] && crashed; do
  start=$((start + 1))
  export NNODES=${#active[@]} RUN_ID="ssh-$$-$start"
  names=()
  for i in "${active[@]}"; do names+=("${hosts[i]#*@}"); done
  [ "${active[0]}" = 0 ] && head_host=${HEAD%:*} || head_host=${names[0]}
  HEAD=$head_host:$((port + start - 1)) # another port: the earlier rendezvous may not have ended
  echo "the run crashed; starting again on $NNODES of ${#hosts[@]} hosts ($(IFS=, && echo "${names[*]}"))"
  start_hosts
done
if [ "$status" != 0 ]; then
  sleep 0.2
  if [ -n "${interrupted:-}" ]; then
    echo "error: interrupted" >&2
  elif [ "$status" = 255 ]; then
    echo "error: the connection to ${hosts[failed]} was lost; its ranks shut down on their own, and the other hosts were shut down" >&2
  else
    echo "[${hosts[failed]}] $(grep -a 'error: ' "$work/output-$failed" | tail -n 1)" >&2
  fi
fi
exit "$status"
