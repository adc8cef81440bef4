#!/usr/bin/env bash
# What a machine with a GPU is asked for, in under 10 minutes: build, sanitize, test, rates and
# products.
#
#   benchmarks/gpu_queue.sh                   # all, in this order
#   benchmarks/gpu_queue.sh build products    # some
#
# OUT is the folder for results (at most 8 files), PYTHON the interpreter; COMMIT names the commit
# of a copy without git. A part that fails or runs out of time does not stop the others; the exit
# code says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

readonly known=(build sanitize test rates products)
declare -rA limits=([build]=100 [sanitize]=130 [test]=110 [rates]=45 [products]=180)  # seconds
python=${PYTHON:-python3}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin  # nvcc and compute-sanitizer
export COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}

parts=("$@")
if [ $# = 0 ]; then parts=("${known[@]}"); fi
for part in "${parts[@]}"; do
  if [ -z "${limits[$part]:-}" ]; then
    echo "parts are: ${known[*]}; got: $part" >&2
    exit 2
  fi
done

# The first GPU's name, driver or compute capability, such as: gpu name
gpu() { nvidia-smi --query-gpu="$1" --format=csv,noheader --id=0 2>/dev/null | head -n 1; }

device=$(gpu name)
device=${device:-no GPU}
slug=$(tr '[:upper:] ' '[:lower:]-' <<<"$device")
out=${OUT:-benchmarks/results/$slug-$(date +%F)-$COMMIT}
mkdir -p "$out"

# The architecture to build for, as nvcc calls it: 90a for 9.0, whose wgmma needs the a.
architecture() {
  local capability
  capability=$(gpu compute_cap | tr -d .)
  if [ -z "$capability" ]; then
    echo "there is no GPU: nvidia-smi finds none" >&2
    return 1
  fi
  if [ "$capability" = 90 ]; then capability=90a; fi
  echo "$capability"
}

build() {
  local arch
  arch=$(architecture) || return
  "$python" -m pip install --no-build-isolation --no-deps --no-index \
    -C cmake.define.JAX_ANYPREC_CUDA=ON -C "cmake.define.JAX_ANYPREC_CUDA_ARCHITECTURES=$arch" \
    --editable .
}

# The tests of the kernels, under a command if one is given. Those of a machine without a GPU or an
# extension are skipped, which is not to pass.
kernel_tests() {
  local file=tests/test_cuda_device.py
  architecture >/dev/null || return
  "$@" "$python" -m pytest -o addopts= -ra ${select:+-k "$select"} "$file" || return
  grep -Eq '[1-9][0-9]* passed' "$out/$part.log" || { echo "no test ran"; return 1; }
}

# Each buffer is an allocation of its own, so that memcheck sees what leaves it. Errors of CUDA's
# interface that libraries provoke and handle are not ours. Each tool has half of the time.
sanitize() {
  local select=small failed=0
  export XLA_PYTHON_CLIENT_ALLOCATOR=platform
  kernel_tests timeout 64 compute-sanitizer --error-exitcode 1 --report-api-errors no || failed=1
  kernel_tests timeout 64 compute-sanitizer --error-exitcode 1 --tool racecheck || failed=1
  return "$failed"
}

rates() { "$python" -m benchmarks.gpu.rates --json "$out/rates.json"; }

products() {
  local peaks=()
  if [ -e "$out/rates.json" ]; then peaks=(--peaks "$out/rates.json"); fi
  "$python" -m benchmarks.gpu.products --quick "${peaks[@]}" --rows "$out/products.jsonl"
}

# Run the part within its limit and say how it ended, as a line of a table.
run() {
  local command=$part begin=$SECONDS code ended
  if [ "$part" = test ]; then command=kernel_tests; fi
  echo "=== $part, at most ${limits[$part]} s" >&2
  timeout --kill-after=5 "${limits[$part]}" bash -uo pipefail -c "$command" >"$out/$part.log" 2>&1
  code=$?
  case $code in
    0) ended=passed ;;
    124 | 137) ended="out of time" ;;
    *) ended="failed ($code)" ;;
  esac
  tail -n 15 "$out/$part.log" >&2
  echo "=== $part: $ended after $((SECONDS - begin)) s" >&2
  echo "| $part | $ended | $((SECONDS - begin)) | $(last_line) |"
  return "$code"
}

last_line() { grep -v '^\s*$' "$out/$part.log" | tail -n 1 | tr '|' '/' | cut -c 1-200; }

# summary.md: what ran, then the tables of rates and of products, also of a run that was killed.
summary() {
  printf '# %s\n\n- driver: %s\n- date: %s\n- commit: %s\n\n' \
    "$device" "$(gpu driver_version)" "$(date +%F)" "$COMMIT"
  printf '| part | | seconds | last line |\n| --- | --- | --- | --- |\n%s\n' "$1"
  if [ -e "$out/rates.json" ]; then
    printf '\n## Rates\n\n'
    grep '^|' "$out/rates.log"
  fi
  if [ -s "$out/products.jsonl" ]; then
    printf '\n'
    "$python" -m benchmarks.gpu.summary "$out/products.jsonl"
  fi
}

export -f gpu architecture build kernel_tests sanitize rates products
export out part python PYTHONUNBUFFERED=1
table="" status=0
for part in "${parts[@]}"; do
  line=$(run) || status=1
  table+="$line"$'\n'
  summary "$table" >"$out/summary.md"
done
cat "$out/summary.md"
exit "$status"
