#!/usr/bin/env bash
# How images/s grow with the number of ranks on this machine: the benchmark (`python -m ddp_cifar.benchmark`) on 1, 2, 4 ...
# ranks, weak (as many images a rank) and strong (as many in all), then a table and a plot:
#
#     launch/scaling.sh FOLDER [CONFIG.yaml] [key=value ...] [--rounds N]
#
# FOLDER gets weak-N.json, strong-N.json, scaling.md and scaling.png, in place of those of an earlier call.
#
# Settings, by environment variables:
#   MAX_RANKS        the most ranks; default: the GPUs, else the cores
#   IMAGES           images a rank in a step (128); strong: of the most ranks
#   OMP_NUM_THREADS  CPU threads a rank; default: cores / MAX_RANKS, and so as many on one rank as on the most
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
folder=${1:-}
case $folder in
  '' | -* | *=* | *.yaml) refuse "expected launch/scaling.sh FOLDER [CONFIG.yaml] [key=value ...]: FOLDER gets the results" ;;
esac
shift
cores=$(nproc) gpus=$(count_gpus)
max_ranks=${MAX_RANKS:-$((gpus > 0 ? gpus : cores))} images=${IMAGES:-128}
check_count MAX_RANKS "$max_ranks"
check_count IMAGES "$images"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > max_ranks ? cores / max_ranks : 1))}
mkdir -p "$folder"
rm -f "$folder"/weak-*.json "$folder"/strong-*.json

# measure KIND RANKS GLOBAL_BATCH ARGUMENT...: one result.
measure() {
  local ranks=$2 batch=$3
  echo "== $1 scaling, $ranks ranks"
  NPROC_PER_NODE=$ranks MODULE=ddp_cifar.benchmark "$here/local.sh" "${@:4}" \
    "train.global_batch_size=$batch" "train.micro_batch_size=$((batch / ranks))" --json "$folder/$1-$ranks.json"
}

for ((ranks = 1; ranks <= max_ranks; ranks *= 2)); do
  measure weak "$ranks" $((images * ranks)) "$@"
  [ $((images * max_ranks % ranks)) != 0 ] || measure strong "$ranks" $((images * max_ranks)) "$@"
done
python -m ddp_cifar.scaling "$folder"
