#!/usr/bin/env bash
# `benchmarks/gpu_day.sh prepare | run 1 OUT | run 2 OUT | records TAR ...`: see gpu_day.py. PYTHON names the interpreter.
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m benchmarks.gpu_day "$@"
