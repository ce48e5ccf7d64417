#!/usr/bin/env bash
# Runs tests under each supported pair of MindFormers and MindSpore, in an environment of its own for each.
#
#   bash scripts/test_matrix.sh                          all pairs
#   bash scripts/test_matrix.sh 1.6.0 1.7.0:2.7.2        these versions of MindFormers, the second with mindspore 2.7.2
#   bash scripts/test_matrix.sh --python python3.9 1.9.0 with this interpreter (default: Python 3.11, 3.10 or 3.9)
#   bash scripts/test_matrix.sh --write                  and put the results into docs/compatibility.md
#   TELECHAT_MATRIX_DIR=DIR bash scripts/test_matrix.sh  where the environments go (3.5 GB each; default .venv-matrix)
#   TELECHAT_MATRIX_TESTS="tests" bash scripts/test_matrix.sh   what pytest is given
#
# Everything else, and what the exit code means: scripts/matrix.py
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
works() { "$1" -c 'import sys, venv; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }
python=${TELECHAT_PYTHON:-}
if [ -z "$python" ]; then
    for each in python3.11 python3.10 python3.9 python3.12 python3; do
        if works "$each"; then python=$each; break; fi
    done
fi
[ -n "$python" ] || { echo "error: no Python 3.9 to 3.12 found; name one in TELECHAT_PYTHON" >&2; exit 1; }
exec "$python" scripts/matrix.py "$@"
