#!/usr/bin/env bash
# Check the workbench on this machine's GPU and measure it, in at most seven minutes, most important first.
#   tests/gpu/run.sh [FOLDER]    results in FOLDER, by default $OUT or build/gpu/results
#   tests/gpu/run.sh --dry       the same on a CPU with a tiny network, in a minute
# Where diffusers or zarr is missing, the wheels that prepare.sh gathered are unpacked beside it, without a network.
set -uo pipefail
cd "$(dirname "$0")/../.."
dry=(); [ "${1:-}" = --dry ] && { dry=(--dry); shift; }
out=$(realpath -m "${1:-${OUT:-build/gpu/results}}")
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if ! "$python" -c "import diffusers, zarr" 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        build/gpu/wheels/*.whl || exit 2
    PYTHONPATH=$PWD:$site
fi
mkdir -p "$out"
if [ ${#dry[@]} -gt 0 ]; then
    "$python" tests/gpu/parts.py "$out" correctness speeds edits sharing --dry
    exit
fi
end=$((SECONDS + 400)) status=0
for part in correctness:120 speeds:200 edits:50 sharing:45; do
    left=$((end - SECONDS)) most=${part#*:}
    [ "$most" -lt "$left" ] || most=$left
    [ "$most" -gt 5 ] || { echo "== no time is left for ${part%:*}"; status=1; continue; }
    echo "== ${part%:*}, at most $most s"
    timeout -k 5 "$most" "$python" tests/gpu/parts.py "$out" "${part%:*}" || { echo "== ${part%:*} failed ($?)"; status=1; }
done
exit $status
