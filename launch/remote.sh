#!/usr/bin/env bash
# launch/node.sh on a host that launch/ssh.sh has reached. Input is a line to there: a dot a moment, or a signal's name, which the node
# gets. When it is cut, or silent for half a minute, the run is asked to stop, and ended if it does not.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"
set -m # the node gets a group of its own, and Ctrl-C from here alone
"$here/node.sh" "$@" </dev/null &
node=$!
set +m
trap '' HUP PIPE TERM INT # the node is ended in good order
while kill -0 "$node" 2>/dev/null; do
  word=''
  if IFS= read -r -t 30 word; then
    case $word in INT | TERM | USR1 | QUIT) kill -s "$word" "$node" 2>/dev/null || true ;; esac
    continue
  fi
  exec >/dev/null 2>&1 # nobody reads any more
  kill -TERM "$node" 2>/dev/null || true
  for ((i = 0; i < 120; i++)); do
    kill -0 "$node" 2>/dev/null || exit 1
    sleep 0.5
  done
  kill -QUIT "$node" 2>/dev/null || true
  sleep 10
  # torchrun may wait for a network that is gone; its ranks end with it
  pkill -KILL -P "$node" || true
  kill -KILL "$node" 2>/dev/null || true
  exit 1
done
wait_for "$node" && status=0 || status=$?
exit "$status"
