#!/usr/bin/env bash
# Set-up, ruff, type check and all tests that need no GPU: `bash scripts/test.sh`.
#
#   --install-only    stop after the set-up
#   anything else     goes to pytest, e.g. `bash scripts/test.sh tests/unit -k flops`
#
# WORKERS=N sets the number of test processes (default: one a core). NO_VENV=1 uses the present
# Python environment; see scripts/lib.sh for the other variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

INSTALL_ONLY=0
if [ "${1:-}" = --install-only ]; then
  INSTALL_ONLY=1
  shift
fi

# lmms-eval asks for dozens of packages; its tests need it and the few of the extra `lmms`.
setup_lmms() {
  local version=0.7.3
  has_packages lmms || install_extras lmms || return
  "$PY" -c "import importlib.metadata as m; assert m.version('lmms-eval') == '$version'" \
    2>/dev/null && return
  say "installing lmms-eval without its requirements"
  pip_install --no-deps "lmms-eval==$version"
}

setup_env dev,train,eval,deepspeed
if [ "$DRY_RUN" != 1 ]; then
  setup_lmms || say "lmms-eval cannot be installed here: its tests are skipped"
fi
[ "$INSTALL_ONLY" = 1 ] && exit 0

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
failed=()
say "ruff"
run "$PY" -m ruff check llava tests scripts || failed+=(ruff)
say "mypy (core)"
run "$PY" -m mypy || failed+=(mypy)
say "pytest"
# One test process a core: every test runs on one thread. The files with ranks come first, because
# they take longest and a core alone is idle at the end.
run "$PY" -m pytest -n "${WORKERS:-auto}" --dist loadfile --no-loadscope-reorder "$@" || failed+=(pytest)

if [ ${#failed[@]} -gt 0 ]; then
  die "failed: ${failed[*]}"
fi
