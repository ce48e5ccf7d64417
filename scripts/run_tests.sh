#!/usr/bin/env bash
# Runs the linter, the check of spelling, the type checker and the tests in the project's environment, which it makes
# where there is none (see env.sh).
#
#   bash scripts/run_tests.sh                       all tests
#   bash scripts/run_tests.sh -m "not slow"         arguments go to pytest
#   TELECHAT_TEST_WORKERS=4 bash scripts/run_tests.sh
#                                                   number of processes, some 6 GB of memory each (default: 2 for all,
#                                                   0, this one, for chosen files or -k)
#   TELECHAT_TEST_SECONDS=1 bash scripts/run_tests.sh
#                                                   notes in tests/seconds.json what each file takes: files that take
#                                                   long begin first
#   TELECHAT_TEST_TORCH=1 bash scripts/run_tests.sh torch and PEFT are installed too, so that tests with them run, and
#                                                   lm-evaluation-harness, unless TELECHAT_TEST_EVALUATION=0, and the
#                                                   server's clients (openai, LangChain), unless TELECHAT_TEST_CLIENTS=0
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

extras=(dev serve constrained)
if [ "${TELECHAT_TEST_TORCH:-0}" = 1 ]; then extras+=(torch peft); fi
if [ "${TELECHAT_TEST_EVALUATION:-${TELECHAT_TEST_TORCH:-0}}" = 1 ]; then extras+=(evaluation); fi
if [ "${TELECHAT_TEST_CLIENTS:-${TELECHAT_TEST_TORCH:-0}}" = 1 ]; then extras+=(clients); fi
telechat_env "${extras[@]}"
cd "$TELECHAT_ROOT"

lint=0
if "$PYTHON" -c 'import ruff' 2>/dev/null; then
    "$PYTHON" -m ruff check . || lint=$?
else
    echo "ruff is not installed: no lint."
fi
if "$PYTHON" -c 'import codespell_lib' 2>/dev/null; then
    "$PYTHON" -m codespell_lib || lint=$?
else
    echo "codespell is not installed: no check of spelling."
fi
types=0
if "$PYTHON" -c 'import mypy' 2>/dev/null; then
    "$PYTHON" -m mypy || types=$?
else
    echo "mypy is not installed: types are not checked."
fi
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "torch is not installed: tests of .bin checkpoints and PEFT will skip (TELECHAT_TEST_TORCH=1 installs it)."
fi
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("lm_eval") is None)'; then
    echo "lm-eval is not installed: tests with it will skip (TELECHAT_TEST_EVALUATION=1 installs it)."
fi
# A file's tests stay in one process, as they share compiled graphs and trained models. For chosen files or names one
# process is enough.
case " $* " in *" tests/"* | *" -k "*) workers=0 ;; *) workers=2 ;; esac
workers=${TELECHAT_TEST_WORKERS:-$workers}
spread=()
if [ "$workers" != 0 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then
    spread=(-n "$workers" --dist loadfile --no-loadscope-reorder)
fi
tests=0
"$PYTHON" -m pytest ${spread[@]+"${spread[@]}"} "$@" </dev/null || tests=$?
if [ "$lint" -ne 0 ] && [ "$tests" -eq 0 ]; then
    echo "error: the tests passed, but ruff or codespell found errors (listed before the tests)." >&2
    exit "$lint"
fi
if [ "$types" -ne 0 ] && [ "$tests" -eq 0 ]; then
    echo "error: the tests passed, but mypy found errors (listed before the tests)." >&2
    exit "$types"
fi
exit "$tests"
