#!/usr/bin/env bash
# Everything there is to know about the GPU encoder, in one command on a machine with a GPU, torch and torch-geometric:
# checks every kernel against its definition (fails loudly), looks for races, times, and leaves JSON lines in $OUT and
# bench/results. Needs no network. Wheels in .whl/ are put on the path; .bench/hierarchy.npz, where it is there, says
# which meshes (else the open head's, else a ball of the same size):
#   python -c "from chebface import heads, hierarchy as h; h.save(h.for_head(heads.open_head()), '.bench/hierarchy.npz')"
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-$(mktemp -d)}
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export CHEBFACE_CACHE=${CHEBFACE_CACHE:-$(mktemp -d)}
if compgen -G ".whl/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$CHEBFACE_CACHE/site" .whl/*.whl
    export PYTHONPATH="$CHEBFACE_CACHE/site:$PYTHONPATH"
fi
mesh=()
[ -f .bench/hierarchy.npz ] && mesh=(--hierarchy .bench/hierarchy.npz)
nvidia-smi -L
python3 -m bench.gpu --check --batch 3 --batch 133 "${mesh[@]}"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        code=0
        timeout 150 compute-sanitizer --tool $tool --error-exitcode 9 \
            python3 -m bench.gpu --check --batch 1 "${mesh[@]}" >"$out/$tool.txt" 2>&1 || code=$?
        case $code in
            0) echo "$tool: clean" ;;
            3 | 9) tail -40 "$out/$tool.txt"; exit $code ;;
            *) echo "$tool: did not run to its end here (exit code $code, see $tool.txt)" ;;
        esac
    done
fi
python3 -m bench.gpu "${mesh[@]}" "$@" -o "$out/kernels_gpu.jsonl" | tee "$out/kernels_gpu.txt"
mkdir -p bench/results
cat "$out/kernels_gpu.jsonl" >>bench/results/kernels_gpu.jsonl
