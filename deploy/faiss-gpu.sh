#!/usr/bin/env bash
# Replaces the CPU build of FAISS by the GPU one, in the environment of the given Python (default: python3 on PATH).
#   deploy/faiss-gpu.sh .venv/bin/python
# Both builds install the module `faiss`: the one has to go before the other comes.
set -euo pipefail

python=${1:-python3}
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pip=("$python" -m pip --disable-pip-version-check)
"${pip[@]}" uninstall --yes faiss-cpu faiss-gpu faiss-gpu-cu12
"${pip[@]}" install --no-cache-dir --no-deps --requirement "$folder/faiss-gpu.txt"
