#!/usr/bin/env bash
# Prepares a real Triton Inference Server that needs neither Docker nor a GPU:
#   .triton/                 its own Python environment (its NumPy must be < 2: see backends/onnxruntime/model.py)
#   build/triton/backends/   the backend directory: Triton's python backend and our onnxruntime backend
#   build/triton/setup.json  written last; triton/run.py reads it, and a second run of this script stops at it
# Exit: 0 ready · 3 the bundled Triton cannot run on this machine (one sentence on stdout) · else a failure.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.triton
out=$root/build/triton
stamp=$out/setup.json
packages=(nvidia-pytriton==0.7.0)       # Apache-2.0; carries tritonserver 2.51 and its python backend
helpers=('numpy<2' 'onnxruntime>=1.20')

cannot() {
  echo "Triton cannot run on this machine: $1"
  exit 3
}

fingerprint=$(cat "${BASH_SOURCE[0]}" "$root"/triton/backends/*/*.py | cksum | tr ' ' '-')
is_ready() { [[ -f $stamp ]] && grep -q "\"$fingerprint\"" "$stamp" && [[ -x $venv/bin/python3 ]]; }
is_ready && exit 0

[[ $(uname -s) == Linux ]] || cannot "it is built for Linux, this is $(uname -s)."
[[ $(uname -m) == x86_64 ]] || cannot "it is built for x86_64, this is $(uname -m)."
glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2) || true
[[ -n $glibc ]] || cannot "it needs glibc, this is another C library (musl?)."
[[ $(printf '%s\n' 2.35 "$glibc" | sort -V | head -1) == 2.35 ]] || cannot "it needs glibc 2.35, this is $glibc."

mkdir -p "$out"
exec 9>"$out/.lock"
flock 9                                  # two test runs may start together
is_ready && exit 0

# Prints "major.minor|directory of its libpython" when this interpreter can host the backend's stub process.
probe='
import os, sys, sysconfig
import ensurepip, venv
version = "%d.%d" % sys.version_info[:2]
if version not in ("3.10", "3.11", "3.12"):
    sys.exit(1)
library = "libpython%s.so.1.0" % version
places = [sysconfig.get_config_var("LIBDIR") or "", sys.base_prefix + "/lib"]
found = [place for place in places if os.path.exists(os.path.join(place, library))]
if not found:
    sys.exit(1)
print(version + "|" + found[0])
'
python='' version='' libdir=''
for candidate in python3 python3.12 python3.11 python3.10 /usr/bin/python3 /usr/bin/python3.1{2,1,0} \
  /usr/local/bin/python3.1{2,1,0}; do
  if answer=$("$candidate" -c "$probe" 2>/dev/null); then
    python=$candidate version=${answer%%|*} libdir=${answer##*|}
    break
  fi
done
[[ -n $python ]] || cannot "it needs Python 3.10, 3.11 or 3.12 with a shared libpython and venv (on Debian or \
Ubuntu: apt install python3-venv libpython3.11)."

installed=$venv/.installed-$(printf '%s' "$version ${packages[*]} ${helpers[*]}" | cksum | tr ' ' '-')
if [[ ! -f $installed ]]; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
  pip=("$venv/bin/python3" -m pip --quiet --disable-pip-version-check install)
  "${pip[@]}" "${helpers[@]}"
  "${pip[@]}" --no-deps "${packages[@]}" # its dependencies are for its Python API, which is not used
  touch "$installed"
fi

bundle=$venv/lib/python$version/site-packages/pytriton/tritonserver
stub=$bundle/python_backend_stubs/$version/triton_python_backend_stub
export LD_LIBRARY_PATH=$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# Without this check a stub that cannot load its libpython makes the server hang instead of fail.
for binary in "$bundle/bin/tritonserver" "$stub"; do
  missing=$(ldd "$binary" 2>&1 | grep -E 'not found|not a dynamic' || true)
  [[ -z $missing ]] || cannot "$(basename "$binary") misses libraries: $(echo "$missing" | xargs)."
done
"$venv/bin/python3" -c 'import numpy, onnxruntime; assert int(numpy.__version__.split(".")[0]) < 2'

backends=$out/backends
rm -rf "$backends"
mkdir -p "$backends/python"
cp "$bundle"/backends/python/*.so "$bundle"/backends/python/*.py "$backends/python/"  # a symlinked .so is refused
ln -s "$stub" "$backends/python/"
cp -r "$root"/triton/backends/* "$backends/"

printf '{"fingerprint": "%s", "tritonserver": "%s", "backends": "%s", "venv": "%s", "libdir": "%s"}\n' \
  "$fingerprint" "$bundle/bin/tritonserver" "$backends" "$venv" "$libdir" >"$stamp.new"
mv "$stamp.new" "$stamp"
