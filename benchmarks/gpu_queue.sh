#!/usr/bin/env bash
# What a machine with a GPU is asked for, in under 10 minutes: build, sanitize, test, rates,
# products and decode.
#
#   benchmarks/gpu_queue.sh                   # these, in this order
#   benchmarks/gpu_queue.sh build tune        # some, or others
#
# OUT is the folder for results (at most 8 files), PYTHON the interpreter; COMMIT names the commit
# of a copy without git. A part that fails or runs out of time does not stop the others; the exit
# code says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

readonly usual=(build sanitize test rates products decode)
readonly known=("${usual[@]}" tune)
declare -rA limits=(  # seconds
  [build]=100 [sanitize]=110 [test]=90 [rates]=45 [products]=110 [decode]=130 [tune]=300
)
python=${PYTHON:-python3}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin  # nvcc and compute-sanitizer
export COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}

parts=("$@")
if [ $# = 0 ]; then parts=("${usual[@]}"); fi
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

# The tests of the kernels, with these options, under the command `under` if there is one. Those of
# a machine without a GPU or an extension are skipped, which is not to pass.
kernel_tests() {
  architecture >/dev/null || return
  ${under:-} "$python" -m pytest -o addopts= -ra "$@" tests/test_cuda_device.py || return
  grep -Eq '[1-9][0-9]* passed' "$out/$part.log" || { echo "no test ran"; return 1; }
}

# Most of the time is compiling, so several processes share the GPU where pytest-xdist is installed.
# `test` is a command of the shell.
tests() {
  local workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  kernel_tests "${workers[@]}"
}

# Each buffer is an allocation of its own, so that memcheck sees what leaves it. Errors of CUDA's
# interface that libraries provoke and handle are not ours. Each tool has half of the time.
sanitize() {
  local failed=0 tool="timeout 54 compute-sanitizer --error-exitcode 1"
  export XLA_PYTHON_CLIENT_ALLOCATOR=platform
  under="$tool --report-api-errors no" kernel_tests -k small || failed=1
  under="$tool --tool racecheck" kernel_tests -k small || failed=1
  return "$failed"
}

rates() { "$python" -m benchmarks.gpu.rates --json "$out/rates.json"; }

# A benchmark of this name, with what `rates` measured if it did.
measure() {
  local peaks=()
  if [ -e "$out/rates.json" ]; then peaks=(--peaks "$out/rates.json"); fi
  "$python" -m "benchmarks.gpu.$1" "${peaks[@]}" "${@:2}"
}

products() { measure products --quick --rows "$out/products.jsonl"; }

# Each case compiles programs anew, so that there may be no time for the last ones.
decode() {
  measure decode --models llama-2-7b --precisions W4A16 W4A8 W2A16 W2A8 W1A8 \
    --batches 1 16 --contexts 128 --prompts 512 --seconds 60 --rows "$out/decode.jsonl"
}

tune() {
  measure tune --precisions W2A2 W2A8 W4A8 W4A16 --m 1 1024 --layers 1 --seconds 220 \
    --json "$out/tune.json"
}

# Run the part within its limit and say how it ended, as a line of a table.
run() {
  local command=$part begin=$SECONDS code ended
  if [ "$part" = test ]; then command=tests; fi
  echo "=== $part, at most ${limits[$part]} s" >&2
  rm -f "$out/$part".{json,jsonl}  # of a run before
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

# The tables of the part's results, also of a run that was killed.
tables() {
  case $part in
    rates) [ -e "$out/rates.json" ] && printf '\n# Rates\n\n' && grep '^|' "$out/rates.log" ;;
    products)
      [ -s "$out/products.jsonl" ] && printf '\n# Single layers\n\n' &&
        "$python" -m benchmarks.gpu.summary "$out/products.jsonl"
      ;;
    decode)
      [ -s "$out/decode.jsonl" ] && printf '\n# Whole models\n\n' &&
        "$python" -m benchmarks.gpu.decode_summary "$out/decode.jsonl"
      ;;
    tune)
      [ -e "$out/tune.json" ] && printf '\n# Choices of plan()\n\n' &&
        sed -n '/^## /,$p' "$out/tune.log"
      ;;
  esac
}

# summary.md: what ran, and then all tables.
summary() {
  printf '# %s\n\n- driver: %s\n- date: %s\n- commit: %s\n\n' \
    "$device" "$(gpu driver_version)" "$(date +%F)" "$COMMIT"
  printf '| part | | seconds | last line |\n| --- | --- | --- | --- |\n%s\n%s\n' "$1" "$2"
}

export -f gpu architecture build kernel_tests tests sanitize rates measure products decode tune
export out part python PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # other processes have their part of the GPU's memory
rm -f "$out/log.txt"
ended="" results="" status=0
for part in "${parts[@]}"; do
  ended+=$(run)$'\n' || status=1
  results+=$(tables)$'\n'
  summary "$ended" "$results" >"$out/summary.md"
  { echo "=== $part"; cat "$out/$part.log"; } >>"$out/log.txt"
  rm "$out/$part.log"
done
cat "$out/summary.md"
exit "$status"
