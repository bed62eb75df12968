#!/usr/bin/env bash
# Gather what a borrowed machine lacks, for a run without a network: wheels for Linux on x86-64 in build/gpu/wheels.
#   tests/gpu/prepare.sh [PYTHON_VERSION]    that of the machine, by default 3.12
# The machine is taken to have torch (2.11 or newer, for CUDA), accelerate, huggingface_hub, safetensors, numpy, SciPy,
# pandas, pyarrow, scikit-learn, joblib, matplotlib, Pillow, PyYAML, psutil, tqdm, filelock, fsspec and typer.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-3.12} wheels=build/gpu/wheels
names=(diffusers zarr numcodecs donfig google-crc32c importlib_metadata zipp)
rm -rf "$wheels"
platforms=()
for glibc in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
${PYTHON:-python3} -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 -c constraints.txt -d "$wheels" "${names[@]}"
tree=$(git ls-files -z --cached --others --exclude-standard | { xargs -0 stat -c %s 2>/dev/null || true; } |
    awk '{ bytes += $1 } END { print bytes }')  # files that a sparse checkout leaves out are not there
both=$(((tree + $(cat "$wheels"/*.whl | wc -c)) / 1048576))
echo "$(ls "$wheels" | wc -l) wheels for Python $version in $wheels; $both MiB with the tree"
if [ "$both" -ge 60 ]; then
    echo "More than 60 MiB. What the run does not need can stay behind until 'git sparse-checkout disable':"
    echo "  git sparse-checkout set --no-cone '/*' '!/data/models/avataaars64/' '!/data/models/avataaars32-h/'"
fi
