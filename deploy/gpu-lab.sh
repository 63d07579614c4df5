#!/usr/bin/env bash
# Everything that is to be run once on a machine with a GPU: under nine minutes, no network.
#   deploy/gpu-lab.sh OUT [--smoke]        PYTHON=… chooses the interpreter; default: .venv, else python3 on PATH
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${1:?usage: deploy/gpu-lab.sh OUT [--smoke]}")
shift
python=${PYTHON:-$([[ -x $root/.venv/bin/python ]] && echo "$root/.venv/bin/python" || echo python3)}
cd "$root"
if [[ ! -f liverank/v1/ranking_pb2.py ]]; then
  # A bare copy of the tree: the messages are generated, by the same tool as in a build.
  mkdir -p liverank/v1 && touch liverank/__init__.py liverank/v1/__init__.py
  "$python" -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. proto/liverank/v1/*.proto
fi
exec "$python" -m loadtest.gpu.lab "$out" "$@"
