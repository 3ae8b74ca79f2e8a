#!/bin/sh
# The GPU suite: correctness, then performance, on a machine with one GPU and no network. All arguments go to
# gpu_suite.py (--help, --list, --parts, --output, --budget-minutes).
#   benchmarks/gpu_suite.sh                                             in a checkout after `make setup`
#   PYTHON=python3 PYTHONPATH=/tmp/site benchmarks/gpu_suite.sh        with a Python that has everything, no .venv
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "no Python at $python: run 'make setup', or set PYTHON" >&2; exit 2; }
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec "$python" benchmarks/gpu_suite.py "$@"
