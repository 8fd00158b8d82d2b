#!/usr/bin/env bash
# One run over several hosts, by ssh, without a scheduler:
#
#     launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...]
#     MODULE=ddp_cifar.preflight launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...]
#
# HOSTS_FILE has a host a line, as ssh takes it (user@host, or a name of ~/.ssh/config); # begins a comment. ssh must ask for no
# password. Each host is looked at first: reachable, the checkout and the environment there, the same files, the data there
# (train --dry-run). Then launch/node.sh runs on each, which meet on the first one. Each line has its host in front. Ctrl-C stops the
# run, which saves first; twice, it ends everything at once. A host whose connection is lost ends its ranks by itself, and the
# rest end too. After a failure the last line is the error of the host that failed first, and the exit status its own.
#
# Settings, by environment variables, which reach every host:
#   NPROC_PER_NODE, OMP_NUM_THREADS, MAX_RESTARTS, MODULE, and all that begin with NCCL_, GLOO_ or TORCH_   as in node.sh
#   CHECKOUT         the checkout's folder on the hosts (this one's)
#   SETUP            a command that each host runs first, such as "source ~/venv/bin/activate"
#   HEAD             HOST:PORT where the nodes meet: the first host, by the name or address that the others reach it by
#   SSH              the command to connect with (ssh)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

hosts_file=${1:-}
[ -f "$hosts_file" ] || refuse "there is no hosts file ${hosts_file:-(none given)}: expected launch/ssh.sh HOSTS_FILE [CONFIG.yaml] [key=value ...]"
shift
mapfile -t hosts < <(sed -E 's/#.*//; s/^[[:space:]]+//; s/[[:space:]]+$//; /^$/d' "$hosts_file")
[ ${#hosts[@]} -gt 0 ] || refuse "$hosts_file names no host: expected one a line"
for host in "${hosts[@]}"; do
  [[ $host != *[[:space:]]* ]] || refuse "$hosts_file has the line '$host': expected a host alone, NPROC_PER_NODE says how many ranks"
done
twice=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)
[ -z "$twice" ] || refuse "$hosts_file names $twice twice: expected each host once"

folder=${CHECKOUT:-$checkout}
first=${hosts[0]#*@}
export NNODES=${#hosts[@]} RUN_ID="ssh-$$" HEAD=${HEAD:-$first:$((20000 + $$ % 10000))}
[ "$NNODES" = 1 ] || case ${HEAD%:*} in localhost | 127.*) refuse "HEAD=$HEAD is each host itself: set HEAD to the first host's name or address" ;; esac
module=${MODULE:-ddp_cifar.train}
if [ "$module" = ddp_cifar.preflight ]; then
  export MIN_NODES=1
  set -- --nodes "$NNODES" --hosts "$(IFS=, && echo "${hosts[*]#*@}")" "$@"
fi
read -ra connect <<<"${SSH:-ssh}"
LOOK_S=180 # an environment on a slow file system takes a minute to start
connect+=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3)

# on HOST SCRIPT: run a bash script there, in the checkout, with the settings.
settings=$(env | grep -E '^(NPROC_PER_NODE|OMP_NUM_THREADS|MAX_RESTARTS|MODULE|NNODES|MIN_NODES|RUN_ID|HEAD|NCCL_.*|GLOO_.*|TORCH_.*)=' |
  while IFS= read -r line; do printf 'export %s=%q; ' "${line%%=*}" "${line#*=}"; done)
on() {
  local script
  printf -v script 'export NODE_NAME=%q; %s cd %q 2>/dev/null || { echo there is no checkout %q: set CHECKOUT; exit 2; }; %s %s' \
    "${1#*@}" "$settings" "$folder" "$folder" "${SETUP:-:};" "$2"
  # in letters and digits: whatever the login shell there is, it hands them to bash as they are
  "${connect[@]}" "$1" "exec bash -c 'eval \"\$(echo $(base64 <<<"$script" | tr -d '\n') | base64 -d)\"'"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
arguments=$(printf '%q ' "$@")

# -- look at each host
# shellcheck disable=SC2016 # for there
look='source launch/common.sh; command -v torchrun >/dev/null || { echo "torchrun is not on PATH: set SETUP, or make install there"; exit 2; }
echo "files $(find ddp_cifar launch configs -name "*.py" -o -name "*.sh" -o -name "*.yaml" | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c 1-12)"'
if [ "$module" = ddp_cifar.train ]; then
  look+="; ranks=\${NPROC_PER_NODE:-\$(count_gpus)}; [ \"\$ranks\" -gt 0 ] || ranks=1
python -m ddp_cifar.train --dry-run --nodes $NNODES --nproc-per-node \"\$ranks\" $arguments 2>&1"
fi
trap 'kill $(jobs -p) 2>/dev/null || true; exit 130' INT TERM
for i in "${!hosts[@]}"; do
  { connect=(timeout "$LOOK_S" "${connect[@]}") && on "${hosts[i]}" "$look" </dev/null >"$work/look-$i" 2>&1 && echo 0 || echo $?; } >"$work/looked-$i" &
done
wait
bad=0 files=$(sed -n 's/^files //p' "$work/look-0")
for i in "${!hosts[@]}"; do
  looked=$(cat "$work/looked-$i") found=$(sed -n 's/^files //p' "$work/look-$i") reason=$(tail -n 1 "$work/look-$i")
  if [ "$looked" = 124 ]; then
    echo "error: ${hosts[i]} did not answer within $LOOK_S s: does a file system hang there?" >&2
  elif [ "$looked" = 255 ]; then
    echo "error: ${hosts[i]} cannot be reached by ssh (${reason:-no answer})" >&2
  elif [ "$looked" != 0 ]; then
    echo "error: ${hosts[i]}: ${reason:-status $looked}" >&2
  elif [ -n "$files" ] && [ "$found" != "$files" ]; then
    echo "error: ${hosts[i]} has other files in $folder (${found}) than ${hosts[0]} ($files): bring both to the same commit" >&2
  else
    continue
  fi
  bad=$((bad + 1))
done
[ "$bad" = 0 ] || refuse "$bad of ${#hosts[@]} hosts are not ready, for the reasons above; nothing was started"
sed '/^files /d' "$work/look-0"

# -- start
# Each connection's input is a line to the host: launch/remote.sh ends there when it is cut, or silent for half a minute.
nodes=() lines=()
# shellcheck disable=SC2329 # by the traps
tell_all() {
  local line
  interrupted=1
  for line in "${lines[@]}"; do echo "$1" >&"$line" || true; done 2>/dev/null
}
trap '' PIPE
trap 'tell_all INT' INT
trap 'tell_all TERM' TERM HUP
trap 'tell_all USR1' USR1
trap 'tell_all QUIT' QUIT
for i in "${!hosts[@]}"; do
  mkfifo "$work/line-$i"
  (
    trap '' INT # it comes once, from here
    for line in "${lines[@]}"; do exec {line}>&-; done
    on "${hosts[i]}" "launch/remote.sh $arguments" <"$work/line-$i"
  ) > >(trap '' INT TERM && exec tee "$work/said-$i" | sed -u "s/^/[${hosts[i]}] /") 2>&1 &
  nodes+=($!)
  exec {line}>"$work/line-$i"
  lines+=("$line")
done

[ -z "${interrupted:-}" ] || tell_all TERM # which came before all were there
status=0 running=("${!nodes[@]}") failed=''
while [ ${#running[@]} -gt 0 ]; do
  left=()
  for i in "${running[@]}"; do
    if kill -0 "${nodes[i]}" 2>/dev/null; then
      { echo . >&"${lines[i]}" || true; } 2>/dev/null
      left+=("$i")
      continue
    fi
    wait_for "${nodes[i]}" && ended=0 || ended=$?
    if [ "$ended" != 0 ] && [ "$status" = 0 ]; then
      status=$ended failed=$i
      # the others would wait for it; but those of a preflight name it
      if [ "$module" != ddp_cifar.preflight ]; then for line in "${lines[@]}"; do echo QUIT >&"$line" || true; done; fi 2>/dev/null
    fi
  done
  running=("${left[@]}")
  [ ${#running[@]} = 0 ] || sleep 0.5 || true
done
if [ "$status" != 0 ]; then
  sleep 0.2
  if [ -n "${interrupted:-}" ]; then
    echo "error: interrupted" >&2
  elif [ "$status" = 255 ]; then
    echo "error: the connection to ${hosts[failed]} was lost; its ranks end by themselves, the others were ended" >&2
  else
    echo "[${hosts[failed]}] $(grep -a 'error: ' "$work/said-$failed" | tail -n 1)" >&2
  fi
fi
exit "$status"
