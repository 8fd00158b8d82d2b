#!/usr/bin/env bash
# Run launch/node.sh on a host that launch/ssh.sh has connected to. launch/ssh.sh runs this script; do not run it yourself.
#
# Standard input is the control channel. launch/ssh.sh writes a dot as a heartbeat, or the name of a signal, which is sent
# to the node. If the channel is closed or silent for 30 s, the run is asked to save and stop, then killed if it does not.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"
set -m # a separate process group, so that the node gets Ctrl-C only from this script
"$here/node.sh" "$@" </dev/null &
node=$!
set +m
trap '' HUP PIPE TERM INT # this script must survive to shut the node down
while kill -0 "$node" 2>/dev/null; do
  word=''
  if IFS= read -r -t 30 word; then
    case $word in INT | TERM | USR1 | USR2) kill -s "$word" "$node" 2>/dev/null || true ;; esac
    continue
  fi
  exec >/dev/null 2>&1 # the connection is lost, so nothing reads the output
  kill -TERM "$node" 2>/dev/null || true
  for ((i = 0; i < 120; i++)); do
    kill -0 "$node" 2>/dev/null || exit 1
    sleep 0.5
  done
  kill -USR2 "$node" 2>/dev/null || true
  sleep 10
  # torchrun may be blocked by the lost network; its ranks exit when it is killed
  pkill -KILL -P "$node" || true
  kill -KILL "$node" 2>/dev/null || true
  exit 1
done
wait_for "$node" && status=0 || status=$?
exit "$status"
