#!/usr/bin/env bash
# Gather what a borrowed machine lacks, for a run without a network: wheels for Linux on x86-64 in build/gpu/wheels.
#   tests/gpu/prepare.sh [PYTHON_VERSION [--small]]    that of the machine, by default 3.12
# --small takes files that the run does not need out of the working tree, for a copy of at most 60 MiB.
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
small=(data/models/avataaars64 data/models/avataaars32-h data/models/eurosat32 data/models/avataaars32-text data/avataaars)
measure() {
    tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s | awk '{ n += $1 } END { print n }')
    echo "$(((tree + $(cat "$wheels"/*.whl | wc -c)) / 1048576)) MiB"
}
echo "$(ls "$wheels" | wc -l) wheels for Python $version in $wheels; $(measure) with the tree"
if [ "${2:-}" = --small ]; then
    git diff --quiet HEAD -- "${small[@]}" || { echo "commit what changed in ${small[*]} first" >&2; exit 1; }
    git rm -rqf --ignore-unmatch "${small[@]}"
    echo "$(measure) without ${small[*]}, which the run does not need; afterwards: git restore -SW ${small[*]}"
fi
