#!/usr/bin/env bash
# Everything that is to be known about a GPU, in less than nine minutes: `benchmarks/gpu_day.sh [--dry-run] [FOLDER]`.
#
# Each step has a time limit, and a step that fails or runs out of time stops none of those after it. Logs and records go
# to FOLDER (default: benchmarks/results/gpu, in a dry run a temporary one). --dry-run does all of it on the CPU, small.
# The exit status is 0 if every step succeeded.
set -u
cd "$(dirname "$0")/.."

dry=
if [ "${1:-}" = --dry-run ]; then dry=--dry-run; shift; fi
if [ -n "$dry" ]; then folder=${1:-$(mktemp -d)}; else folder=${1:-benchmarks/results/gpu}; fi
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$folder/logs"
summary=$folder/logs/summary.txt
: >"$summary"
failures=0
begin=$SECONDS

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 start=$SECONDS status word
  shift 2
  # The interpreter is slow.
  if [ -n "$dry" ]; then limit=$((3 * limit)); fi
  printf '== %s (at most %s s)\n' "$name" "$limit"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$folder/logs/$name.txt" 2>&1 </dev/null
  status=$?
  case $status in
    0) word=ok ;;
    3) word="not run" ;;
    124 | 137) word="out of time" ;;
    *) word="FAILED ($status)" ;;
  esac
  case $status in 0 | 3) ;; *) failures=$((failures + 1)) ;; esac
  printf '%-12s %-12s %4d s  %s\n' "$name" "$word" $((SECONDS - start)) "$(tail -n 1 "$folder/logs/$name.txt")" | tee -a "$summary"
}

machine() {
  if command -v nvidia-smi; then nvidia-smi; elif command -v rocm-smi; then rocm-smi; elif [ -z "$dry" ]; then return 1; fi
  git log --oneline -1
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "HIP", torch.version.hip)'
}

# Fills the compiler's cache, a process for each file of kernels.
compile() {
  local family pids= status=0
  for family in $("$python" -m benchmarks.launches --list); do
    "$python" -m benchmarks.launches "${dry:---real}" "$family" &
    pids="$pids $!"
    if [ -n "$dry" ]; then break; fi
  done
  for pid in $pids; do wait "$pid" || status=1; done
  return $status
}

# sanitize TOOL: every launch once, under compute-sanitizer.
sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
  if [ -n "$dry" ]; then
    "$python" -m benchmarks.launches --dry-run haar
  elif [ -z "$tool" ]; then
    echo "not run: no compute-sanitizer"
    return 3
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 1 "$python" -m benchmarks.launches
  fi
}

tests() {
  if [ -n "$dry" ]; then
    GPU_REHEARSAL=1 "$python" -m pytest tests/test_gpu.py -k "haar or graph or offsets or attention"
  else
    "$python" -m pytest -m gpu --maxfail 20
  fi
}

kernel_tests() {
  if [ -n "$dry" ]; then
    "$python" -m pytest tests/test_triton_haar.py -k test_half_filters
  else
    "$python" -m pytest tests/test_triton_*.py --ignore tests/test_triton_static.py -m "not slow" --maxfail 20
  fi
}

timings() {
  if [ -n "$dry" ]; then
    "$python" -m benchmarks haar attention --device cuda --dry-run --out "$folder"
  else
    "$python" -m benchmarks block network haar wavelet spatial fourier ffn attention step sdo \
      --device cuda --budget 0.1 --out "$folder"
  fi
}

tuning() {
  "$python" -m benchmarks tune ${dry:+pointwise --dry-run} --seconds 25
}

records() {
  "$python" -m benchmarks report --out "$folder"
  ls "$folder"
}

export -f machine compile sanitize tests kernel_tests timings tuning records
export dry folder python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_MODULE_LOADING=LAZY

step machine 20 bash -c machine
step compile 60 bash -c compile
step tests 100 bash -c tests
step kernel-tests 60 bash -c kernel_tests
step timings 130 bash -c timings
step memcheck 45 bash -c 'sanitize memcheck'
step racecheck 45 bash -c 'sanitize racecheck'
step tuning 40 bash -c tuning
step records 20 bash -c records
echo "$((SECONDS - begin)) s, $failures failed; logs and records: $folder" | tee -a "$summary"
[ "$failures" -eq 0 ]
