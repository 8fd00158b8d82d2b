#!/usr/bin/env bash
# Measure the GPU figures of docs/performance.md on one GPU, in two calls of at most eight minutes each:
#
#     benchmarks/gpu.sh 1 FOLDER [DATA_ROOT]      # the GPU tests, speed, time to accuracy
#     benchmarks/gpu.sh 2 FOLDER [DATA_ROOT]      # the original script's recipe, repeatability, backends, other frameworks
#
# FOLDER receives the output of each part as soon as it ends, and JSON files. DATA_ROOT is a folder of images
# (data.name=imagefolder), such as CIFAR-10's; without it, runs on real images are skipped. The parts come in the order of their
# value. A part that fails does not stop the others; one that no time is left for is skipped. Exits with 1 if a part failed.
#
# Lightning and Accelerate are skipped unless they are installed: pip install -e '.[peers]'. The GPU tests need pytest.
# With --short in front, each part runs on the CPU with tiny sizes, to check the script.
set -euo pipefail
usage="expected benchmarks/gpu.sh [--short] 1|2 FOLDER [DATA_ROOT]"
short=
[ "${1:-}" != --short ] || { short=1 && shift; }
call=${1:?$usage} folder=${2:?$usage} data=${3:-}
[[ "$call" = [12] ]] || { echo "found part $call, $usage" >&2 && exit 2; }
[ -z "$data" ] || data=$(cd "$data" && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -c 'import omegaconf, torch, torchvision, tensorboard, tqdm, yaml, PIL, safetensors, matplotlib' ||
  { echo "a package is missing: install those in pyproject.toml" >&2 && exit 2; }
LIMIT=470 # seconds of a call
failed=0

if [ -n "$short" ]; then
  device=cpu modes=(off) workers=0 batches=(8) rounds=1 few=(--steps 2) epochs=2 seeds=(0)
  repeat=(--batch 8 --steps 4 --recipes reproducible)
else
  device=cuda modes=(reduce-overhead off default) workers=4,8 batches=(512 128) rounds=5 few=() epochs=20 seeds=(0 1 2)
  repeat=(--steps 100)
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$folder/gpu.txt"
fi

# part NAME SECONDS COMMAND...: run a part for at most SECONDS; its output goes to FOLDER/NAME.txt too.
part() {
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  echo "== $name: $*"
  [ $((LIMIT - SECONDS)) -lt "$limit" ] && limit=$((LIMIT - SECONDS))
  if [ "$limit" -lt 10 ]; then
    echo "== $name: skipped, no time is left"
    return
  fi
  timeout "$limit" "$@" 2>&1 | tee "$folder/$name.txt" && status=0 || status=$?
  [ "$status" = 0 ] || failed=1
  echo "== $name: exit status $status after $((SECONDS - began)) s" | tee -a "$folder/$name.txt"
}

# bench NAME MODE BATCH MICRO BACKEND LAUNCHER...: images/s, the share of the matrix rate, and the share of a step that waits for
# data.
bench() {
  local name=$1 settings=("train.compile=$2" "train.global_batch_size=$3" "train.micro_batch_size=$4" "backend=$5")
  shift 5
  part "$name" 100 "$@" -m ddp_cifar.benchmark precision=bf16 "device=$device" "${settings[@]}" --rounds "$rounds" "${few[@]}" \
    --json "$folder/$name.json"
}

real=(data.name=imagefolder "data.root=$data" "device=$device")

first_call() {
  if [ -z "$short" ] && python -c 'import pytest' 2>/dev/null; then
    part "tests" 200 python -m pytest -q -m gpu --no-header -p no:cacheprovider tests
  fi
  for mode in "${modes[@]}"; do
    bench "benchmark-${batches[0]}-$mode" "$mode" "${batches[0]}" "${batches[0]}" auto python
  done
  if [ -n "$data" ]; then
    part "prepare" 60 python -m ddp_cifar.prepare "${real[@]}"
    for seed in "${seeds[@]}"; do
      part "speed-$seed" 120 python -m ddp_cifar.train configs/speed.yaml "${real[@]}" "train.compile=${modes[0]}" \
        "seed=$seed" "run_dir=$folder/speed-$seed.run"
    done
    part "speed" 30 python -m ddp_cifar.compare "$folder"/speed-?.run
  fi
  # the original script's batch, in its micro-batches of 32
  for mode in "${modes[@]}"; do
    bench "benchmark-128-in-32-$mode" "$mode" "${batches[-1]}" $((batches[-1] / 4)) auto python
  done
}

second_call() {
  local peers=() sizes=(--batch "${batches[0]}" --rounds "$rounds" "${few[@]}")
  if [ -n "$data" ]; then
    part "article" 240 python -m ddp_cifar.train configs/article.yaml "${real[@]}" precision=bf16 "train.epochs=$epochs" \
      "train.compile=${modes[0]}" "run_dir=$folder/article.run"
    part "article-table" 30 python docs/article/plot.py "$folder/article.run/metrics.jsonl" "$folder/article.png"
  fi
  part "repeats" 200 python benchmarks/repeats.py --device "$device" "${repeat[@]}" --json "$folder/repeats.json"
  part "reproducible" 100 torchrun --standalone --nproc_per_node=1 benchmarks/reproducible.py --device "$device" \
    --micro $((batches[0] / 4)) "${sizes[@]}" --json "$folder/reproducible.json"
  # NCCL with one rank, which is the default on a GPU; then two ranks that share the GPU, with gloo
  bench "ranks-1" off "${batches[0]}" "${batches[0]}" auto torchrun --standalone --nproc_per_node=1
  bench "ranks-2" off "${batches[0]}" $((batches[0] / 2)) gloo torchrun --standalone --nproc_per_node=2
  python -c 'import lightning, accelerate' 2>/dev/null && peers=(--peers)
  part "peers" 200 torchrun --standalone --nproc_per_node=1 benchmarks/speed.py --device "$device" "${sizes[@]}" \
    --workers "$workers" "${peers[@]}" --json "$folder/peers.json" --set "train.compile=${modes[0]}"
}

if [ "$call" = 1 ]; then first_call; else second_call; fi
exit "$failed"
