#!/usr/bin/env bash
# Measure how images per second scale with the number of ranks on this machine. The script runs the benchmark
# (`python -m ddp_cifar.benchmark`) on 1, 2, 4 ... ranks, then writes a table and a plot. Weak scaling keeps the images
# per rank constant. Strong scaling keeps the images per step constant.
#
# Usage:
#
#     launch/scaling.sh FOLDER [CONFIG.yaml] [key=value ...] [--rounds N]
#
# Writes weak-N.json, strong-N.json, scaling.md and scaling.png to FOLDER, and replaces the results of an earlier call.
#
# Settings (environment variables):
#   MAX_RANKS        the largest number of ranks; smaller powers of two are measured too; default: number of GPUs or cores
#   RANKS            a list of numbers of ranks, such as "1 3 6", instead of MAX_RANKS
#   IMAGES           images per rank and step; default 128; for strong scaling, at the largest number of ranks
#   OMP_NUM_THREADS  CPU threads per rank, for all measurements; default: cores / largest number of ranks
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
folder=${1:-}
# The second line is for a recipe's name, such as demo. A folder of that name can be given as ./demo.
if [[ $folder == "" || $folder == -* || $folder == *=* || $folder == *.yaml ]] ||
  [[ $folder != */* && -e $here/../configs/$folder.yaml ]]; then
  user_error "found ${folder@Q} instead of a folder for the results, such as runs/scaling: expected launch/scaling.sh FOLDER [CONFIG.yaml] [key=value ...]"
fi
shift
cores=$(nproc) gpus=$(count_gpus)
most=${MAX_RANKS:-$((gpus > 0 ? gpus : cores))} images=${IMAGES:-128}
check_count MAX_RANKS "$most"
check_count IMAGES "$images"
read -ra counts -d '' <<<"${RANKS:-}" || true
if [ ${#counts[@]} = 0 ]; then
  for ((ranks = 1; ranks < most; ranks *= 2)); do counts+=("$ranks"); done
  counts+=("$most")
fi
most=1
for ranks in "${counts[@]}"; do
  check_count RANKS "$ranks"
  most=$((ranks > most ? ranks : most))
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > most ? cores / most : 1))}
mkdir -p "$folder"
rm -f "$folder"/weak-*.json "$folder"/strong-*.json

# measure KIND RANKS GLOBAL_BATCH_SIZE ARGUMENT...: run one benchmark, with one micro-batch per rank and step.
measure() {
  local ranks=$2 batch=$3
  echo "== $1 scaling, $ranks ranks"
  NPROC_PER_NODE=$ranks MODULE=ddp_cifar.benchmark "$here/local.sh" "${@:4}" \
    "train.global_batch_size=$batch" "train.micro_batch_size=$(((batch + ranks - 1) / ranks))" --json "$folder/$1-$ranks.json"
}

for ranks in "${counts[@]}"; do
  measure weak "$ranks" $((images * ranks)) "$@"
  measure strong "$ranks" $((images * most)) "$@"
done
python -m ddp_cifar.scaling "$folder"
