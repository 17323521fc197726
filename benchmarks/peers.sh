#!/usr/bin/env bash
# Make the peers' environments: benchmarks/peers.sh [lm-eval bergson captum dattri]
# About 1.5 GB each, more where pip picks a CUDA build of torch. (kronfluence is in the project's own.)
set -euo pipefail
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- lm-eval bergson captum dattri
for name in "$@"; do
    [ -f "peers/$name.txt" ] || { echo "error: no peer $name" >&2; exit 1; }
    [ -f "environments/$name/.done" ] && continue
    "${PYTHON:-python3}" -m venv --clear "environments/$name"
    "environments/$name/bin/python" -m pip install -q -r "peers/$name.txt"
    # bergson asks for these and never imports them; their usual builds do not load beside a CPU
    # build of torch, and then no model of transformers does
    "environments/$name/bin/python" -m pip uninstall -qy torchvision torchaudio
    touch "environments/$name/.done"
    echo "$name: environments/$name"
done
