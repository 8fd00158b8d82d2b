#!/usr/bin/env bash
# Try the project with several versions of torch, each in a fresh environment, as a user would.
#
# Usage:
#
#     tests/compat.sh [--python PYTHON] 2.9.1 2.14        # these versions of torch, and the newest other packages
#     tests/compat.sh [--python PYTHON] --lowest          # every package at its lower bound in pyproject.toml
#
# With --when FILE, it only installs at first, and tries once FILE exists.
#
# Prints a line per version: pass, or the step that failed, with the end of its output. The exit status is 1 if any failed.
#
# Needs curl, access to PyPI, and 8 GB in $TMPDIR. Uses CPUs only. With the download of several gigabytes, a version took 7 to
# 16 minutes on two busy cores. CI runs --lowest. docs/install.md has the results, under "Tested versions".
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3 versions=() when=
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=${2:?--python needs a value} && shift ;;
    --lowest) versions+=(lowest) ;;
    --when) when=${2:?--when needs a file} && shift ;;
    [0-9]*) versions+=("$1") ;;
    *) versions=() && break ;;
  esac
  shift
done
[ ${#versions[@]} -gt 0 ] || { sed -n '2,/^set /s/^# \?//p' "${BASH_SOURCE[0]}" >&2 && exit 2; }

# bounds TABLE KEY: print the requirements of this list of pyproject.toml.
bounds() {
  "$work/venv/bin/python" - "$@" <<'END'
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    found = tomllib.load(file)
for key in sys.argv[1:]:
    found = found[key]
print("\n".join(found))
END
}

install() { # VERSION of torch, or lowest
  "$python" -m venv "$work/venv"
  pip uninstall --quiet --yes setuptools # of venv: it would hide that a package does not ask for it
  if [ "$1" = lowest ]; then
    local build lowest
    mapfile -t build < <(bounds build-system requires)
    mapfile -t lowest < <(bounds project dependencies && bounds project optional-dependencies onnx)
    pip install --quiet "${build[@]/>=/==}"
    pip install --quiet --no-build-isolation --no-deps --editable .
    pip uninstall --quiet --yes setuptools
    pip install --quiet "${lowest[@]/>=/==}" pytest
  else
    pip install --quiet --editable '.[onnx]' "torch==$1.*" pytest
  fi
  pip check
}

# same RUN_DIR RUN_DIR: fail unless the state and the metrics of both runs are bitwise identical.
same() {
  PYTHONPATH=tests python - "$@" <<'END'
import sys
from pathlib import Path
from launched import Result
a, b = (Result.of(Path(name)) for name in sys.argv[1:])
assert a == b, f"{sys.argv[1]} and {sys.argv[2]} differ"
END
}

at() { echo "== $1" && echo "$1" >"$work/step"; }

try() { # VERSION
  mkdir "$work/copy" && cd "$work/copy"
  git -C "$checkout" ls-files -z | tar -C "$checkout" --null -T - -c | tar -x
  export PATH="$work/venv/bin:$PATH" CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
  unset PYTHONPATH

  at install
  install "$1"
  until [ -z "$when" ] || [ -e "$when" ]; do sleep 1; done

  at "dry run"
  python -m ddp_cifar.train --dry-run --nodes 3 --nproc-per-node 4 data.name=shapes

  at demo
  NPROC_PER_NODE=2 launch/local.sh configs/demo.yaml train.max_steps=20 run_dir=runs/demo

  at "one and two ranks"
  local exact=(configs/demo.yaml train.ema_decay=0.9 train.max_steps=10 train.reproducible=true train.fingerprint_every=1)
  python -m ddp_cifar.train "${exact[@]}" run_dir=runs/one
  torchrun --nproc_per_node=2 -m ddp_cifar.train "${exact[@]}" run_dir=runs/two
  same runs/one runs/two

  at "kill and resume"
  local paced=(configs/demo.yaml model.name=paced_network:Network data.shapes.train_images=640 train.epochs=4 train.ema_decay=0.9 checkpoint.every_steps=5)
  export PYTHONPATH=tests NPROC_PER_NODE=2 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=10
  launch/local.sh "${paced[@]}" run_dir=runs/whole
  launch/local.sh "${paced[@]}" run_dir=runs/killed &
  until compgen -G "runs/killed/checkpoints/step_*.pt" >/dev/null; do
    kill -0 $! # fails if the run has ended
    sleep 0.1
  done
  kill -9 "$(python -c "import json; print(json.load(open('runs/killed/heartbeats/rank_1'))['pid'])")"
  ! wait $! || { echo "the run survived" && exit 1; }
  [ "$(cat runs/killed/status)" = running ]
  launch/local.sh "${paced[@]}" run_dir=runs/killed
  same runs/whole runs/killed
  unset PYTHONPATH NPROC_PER_NODE TORCH_ELASTIC_SHUTDOWN_TIMEOUT

  at evaluate
  torchrun --nproc_per_node=2 -m ddp_cifar.evaluate runs/demo

  at predict
  mkdir images
  python -c "from PIL import Image; [Image.new('RGB', (40, 30), (9 * i, 99, 0)).save(f'images/{i}.png') for i in range(9)]"
  torchrun --nproc_per_node=2 -m ddp_cifar.predict runs/demo images --batch-size 4 >stdout.csv
  python -m ddp_cifar.predict runs/demo images --batch-size 4 --output file.csv
  cmp stdout.csv file.csv && [ "$(wc -l <stdout.csv)" = 10 ]

  at export
  for format in pt2 safetensors onnx; do
    python -m ddp_cifar.export runs/demo --format "$format" --output "demo.$format"
  done

  at tensorboard
  local port=$((20000 + $$ % 10000))
  tensorboard --logdir runs --port "$port" &
  curl --silent --fail --retry 30 --retry-delay 1 --retry-connrefused "http://127.0.0.1:$port/data/environment"
  kill $! && wait $! || true

  at tests
  pytest -q -m "not slow" tests/config tests/run tests/distributed tests/data/test_decode.py tests/tracking/test_tensorboard.py \
    tests/training/test_{muon,optim,precision,profiling,trial}.py
}

work="" job=""
trap '[ -z "$job" ] || kill -- "-$job" 2>/dev/null; rm -rf "$work"' EXIT
set -m # a process group per version, which the trap ends
status=0
for version in "${versions[@]}"; do
  work=$(mktemp -d)
  start=$SECONDS
  try "$version" >"$work/log" 2>&1 </dev/null & # not `if try`, in which `set -e` has no effect
  job=$!
  if wait "$job"; then result=pass; else
    result="FAILED: $(cat "$work/step")" status=1
    tail -n 50 "$work/log" >&2
  fi
  job=""
  found=$("$work/venv/bin/python" -c "import platform, torch; print(torch.__version__, 'on Python', platform.python_version())") ||
    found="$version with $python"
  echo "torch $found: $result ($((SECONDS - start)) s)"
  rm -rf "$work"
done
exit "$status"
