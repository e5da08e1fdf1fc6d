#!/usr/bin/env bash
# Run the tests.
#
#   bash launch/test.sh [pytest arguments]
#
# The first call sets up .venv with the development tools and compiles the ops that the tests use.
# `python -m pytest --help`, with the python of .venv, lists the arguments of pytest.

set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/setup.sh"

case "${1:-}" in
-h | --help) usage ;;
esac

dstrain_setup dev
dstrain_find_gpus
if ((NUM_GPUS == 0)); then
    export DS_ACCELERATOR=cpu
    dstrain_build_ops shm_comm fused_adam cpu_adam
elif command -v nvcc >/dev/null || [[ -n ${CUDA_HOME:-} ]]; then
    dstrain_build_ops fused_adam cpu_adam
else
    say "No nvcc: DeepSpeed's ops cannot be built for the GPU, tests that need them will fail."
    dstrain_build_ops # none, but locks of killed builds go
fi

cd -- "$ROOT"
exec python -m pytest "$@"
