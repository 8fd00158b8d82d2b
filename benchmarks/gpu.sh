#!/usr/bin/env bash
# Measure the GPU figures of docs/performance.md on one GPU, in under eight minutes:
#
#     benchmarks/gpu.sh FOLDER [DATA_ROOT]
#
# FOLDER receives one file per figure, and all.txt with the output. DATA_ROOT is a folder of images (data.name=imagefolder), such as
# CIFAR-10's; without it, runs on real images are skipped. Lightning and Accelerate are skipped unless they are installed:
# pip install -e '.[peers]'.
set -euo pipefail
folder=${1:?expected benchmarks/gpu.sh FOLDER [DATA_ROOT]} data=${2:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ -z "$data" ] || data=$(cd "$data" && pwd)
cd "$here/.."
exec > >(tee "$folder/all.txt") 2>&1
failed=0

# part NAME COMMAND...: measure one figure; if it fails, the others still run.
part() {
  local name=$1 began=$SECONDS
  shift
  echo "== $name: $*"
  timeout 240 "$@" || { echo "== $name FAILED with status $?" && failed=1; }
  echo "== $name took $((SECONDS - began)) s"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
for mode in off default reduce-overhead; do
  for batch in 512 128; do
    micro=$batch
    [ "$batch" = 512 ] || micro=32 # the original script's
    part "benchmark, batch $batch in $micro, compile $mode" python -m ddp_cifar.benchmark precision=bf16 "train.compile=$mode" \
      "train.global_batch_size=$batch" "train.micro_batch_size=$micro" --rounds 5 --json "$folder/benchmark-$batch-$mode.json"
  done
done
peers=()
python -c 'import lightning, accelerate' 2>/dev/null && peers=(--peers)
part "speed" torchrun --standalone --nproc_per_node=1 benchmarks/speed.py --device cuda --batch 512 --steps 40 --rounds 5 \
  --workers 4,8 "${peers[@]}" --json "$folder/speed.json" --set train.compile=reduce-overhead
if [ -n "$data" ]; then
  real=(data.name=imagefolder "data.root=$data")
  part "the data, decoded once" python -m ddp_cifar.prepare "${real[@]}"
  began=$SECONDS
  part "article" python -m ddp_cifar.train configs/article.yaml "${real[@]}" train.compile=reduce-overhead "run_dir=$folder/article"
  echo "== the original script's recipe, from start to end: $((SECONDS - began)) s"
  for seed in 0 1 2 3 4; do
    part "speed.yaml, seed $seed" python -m ddp_cifar.train configs/speed.yaml "${real[@]}" "seed=$seed" "run_dir=$folder/speed-$seed"
  done
  part "speed.yaml, all seeds" python -m ddp_cifar.compare "$folder"/speed-?
fi
exit "$failed"
