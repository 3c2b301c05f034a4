#!/usr/bin/env bash
# Runs everything that needs a GPU, without network access: installs the package, runs `pytest -m gpu`, times kernels,
# layers, the training command and the simulation, and writes JSON files to ${OUT:-benchmarks/results}.
#
#   bash benchmarks/gpu_check.sh [tests] [kernels] [layers] [eager] [train] [operators]      (default: all six)
#   bash benchmarks/gpu_check.sh pipeline scaling streaming     (times against sizes; rows in host memory)
#   FRAMES="A.npz ..." bash benchmarks/gpu_check.sh time_to_quality     (error against seconds; without FRAMES on
#                                                                        generated rows)
#   STUDY="DATA --time-limit 400" bash benchmarks/gpu_check.sh study     (studies/quality.py with these arguments)
#
# Requires torch, triton, h5py, scikit-build-core, pybind11, cmake, ninja, rich, scikit-learn and pytest. Other packages
# are installed from the folder ${WHEELS:-.whl}; on a machine with network access, for Python 3.12, fill it with:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \
#     pydantic pydantic-core annotated-types typing-inspection \
#     vector-quantize-pytorch einx loguru torch-einops-utils frozendict flash-kmeans     # the last line: peers
#
# Without a GPU, GPU tests are skipped and the benchmarks run at small sizes on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
WHEELS=${WHEELS:-.whl}
PYTHON=${PYTHON:-python3}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export COMMIT PYTHONUNBUFFERED=1
mkdir -p "$OUT"
stages=("$@")
[ $# -gt 0 ] || stages=(tests kernels layers eager train operators)
failed=()

if compgen -G "$WHEELS/*.whl" >/dev/null; then
  site=$(mktemp -d)
  $PYTHON -m pip install -q --no-index --no-deps --no-cache-dir --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
# `make setup` downloads the libdeflate sources; without them the build uses the system's zlib.
options=()
[ ! -d build/libdeflate ] || options=("-Ccmake.define.LIBDEFLATE_SOURCE_DIR=$PWD/build/libdeflate")
[ ! -d build/c-blosc ] || options+=("-Ccmake.define.CODECS_SOURCE_DIR=$PWD/build/c-blosc")
$PYTHON -c 'import spinlock_fast._native' 2>/dev/null ||
  $PYTHON -m pip install -q --no-build-isolation --no-deps -e . ${options[@]+"${options[@]}"} || exit 1
has_gpu=$($PYTHON -c 'import torch; print(int(torch.cuda.is_available()))')
$PYTHON -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__,
  torch.cuda.get_device_name() if torch.cuda.is_available() else "without a GPU")'

stage() { # name, command...
  local name=$1 begin=$SECONDS
  shift
  case " ${stages[*]} " in *" $name "*) ;; *) return ;; esac
  echo "== $name"
  "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - begin)) s"
}

run_tests() {
  $PYTHON -m pytest -q -p no:cacheprovider -m "gpu and not slow" --junitxml="$OUT/tests.xml" tests | tail -30
  local status=${PIPESTATUS[0]}
  $PYTHON - "$OUT/tests.xml" <<'PY' || status=1
import sys
import xml.etree.ElementTree as tree

suite = tree.parse(sys.argv[1]).getroot().find("testsuite").attrib
total, skipped = int(suite["tests"]), int(suite["skipped"])
bad = int(suite["failures"]) + int(suite["errors"])
print(f"{total - skipped} GPU tests ran, {bad} of them failed, {skipped} were skipped without a GPU")
PY
  if [ "$has_gpu" = 0 ]; then # the kernels in Triton's interpreter
    $PYTHON -m pytest -q -p no:cacheprovider --junitxml="$OUT/tests.xml" tests/kernels -m "not gpu" | tail -3 || status=1
    grep -q 'tests="0"' "$OUT/tests.xml" && status=1
  fi
  rm -f "$OUT/tests.xml"
  return "$status"
}

run_eager() {
  if ! $PYTHON -c 'import vector_quantize_pytorch' 2>/dev/null; then
    echo "eager layers are not timed: the package vector-quantize-pytorch is not installed"
    return
  fi
  $PYTHON -m benchmarks.kernels.eager_steps --output "$OUT/eager.json"
}

small=()
[ "$has_gpu" = 1 ] || small=(--rows 2000 --epochs 2 --device cpu)
stage tests run_tests
stage kernels $PYTHON -m benchmarks.kernels.kernel_times --output "$OUT/kernels.json"
stage layers $PYTHON -m benchmarks.kernels.layer_times --output "$OUT/layers.json"
stage eager run_eager
stage train $PYTHON -m benchmarks.training.full_run --output "$OUT/train.json" --commit "$COMMIT" ${small[@]+"${small[@]}"}
few=()
[ "$has_gpu" = 1 ] || few=(--operators 1 --steps 64)
stage operators $PYTHON -m benchmarks.data.operator_rates --output "$OUT/operators.json" ${few[@]+"${few[@]}"}
sizes=(--device cuda --file-rows 1000 10000 100000)
[ "$has_gpu" = 1 ] || sizes=(--device cpu --rows 1000 --file-rows 1000)
stage pipeline $PYTHON -m benchmarks.training.bench_pipeline --output "$OUT/pipeline.json" "${sizes[@]}"
stage scaling $PYTHON -m benchmarks.training.bench_scaling --output "$OUT/scaling.json" "${sizes[@]:0:2}"
rows=(--device cuda)
[ "$has_gpu" = 1 ] || rows=(--device cpu --rows 2000 --batches 512)
stage streaming $PYTHON -m benchmarks.training.streaming --output "$OUT/streaming.json" "${rows[@]}"
read -ra frames <<<"${FRAMES:-}"
[ ${#frames[@]} -gt 0 ] || frames=(--synthetic 20000 --batch-size 512)
quality=(--device cuda)
[ "$has_gpu" = 1 ] || quality=(--device cpu --schedules 2 5 --seeds 0)
stage time_to_quality $PYTHON -m benchmarks.training.time_to_quality "${frames[@]}" --output "$OUT/time_to_quality.json" \
  "${quality[@]}"
read -ra study <<<"${STUDY:-}"
stage study $PYTHON -m benchmarks.studies.quality --output "$OUT/study.jsonl" ${study[@]+"${study[@]}"}

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed: ${stages[*]}"
