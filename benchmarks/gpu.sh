#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes on one H100, without a network: benchmarks/gpu.sh OUT [WHEELS].
# Results go to the folder OUT. WHEELS: the folder that benchmarks/gpu_wheels.py packed, for a machine that has torch, numpy and
# sympy alone. PYTHON: the interpreter. TINY=--tiny: a tiny model, on whatever machine.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "$1"
if [ $# -gt 1 ]; then
  "$python" -m venv --system-site-packages "$1/venv"
  python=$1/venv/bin/python
  "$python" -m pip install --quiet --no-index --no-deps "$2"/*.whl
fi
export PYTHONPATH=src HF_HUB_OFFLINE=1
failed=0
"$python" -m torch.distributed.run --standalone --nproc_per_node 1 benchmarks/gpu.py paths "$1/paths.json" ${TINY:-} || failed=1
"$python" benchmarks/gpu.py costs "$1/costs.json" ${TINY:-} || failed=1
exit "$failed"
