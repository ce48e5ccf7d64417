#!/usr/bin/env bash
# Runs tests under each supported pair of MindFormers and MindSpore, in an environment of its own for each.
#
#   bash scripts/test_matrix.sh                          all pairs, the tests of model, recipes and training
#   bash scripts/test_matrix.sh 1.6.0 1.8.0              these versions of MindFormers
#   TELECHAT_MATRIX_DIR=DIR bash scripts/test_matrix.sh  where the environments go (3.5 GB each; default .venv-matrix)
#   TELECHAT_MATRIX_TESTS="tests" bash scripts/test_matrix.sh   what pytest is given
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
declare -A mindspore=([1.6.0]=2.7.2 [1.7.0]=2.7.2 [1.8.0]=2.7.2 [1.9.0]=2.9.0)
folder=${TELECHAT_MATRIX_DIR:-.venv-matrix}
read -ra tests <<<"${TELECHAT_MATRIX_TESTS:-tests/test_model_reference.py tests/test_recipes.py tests/test_training.py}"
python=${TELECHAT_PYTHON:-$(command -v python3.11 || command -v python3.10 || command -v python3.9 || true)}
[ -n "$python" ] || { echo "error: no Python 3.9 to 3.11 found; name one in TELECHAT_PYTHON" >&2; exit 1; }
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(1.6.0 1.7.0 1.8.0 1.9.0)
summary=()
failed=0
for version in "${versions[@]}"; do
    pair=${mindspore[$version]:-}
    [ -n "$pair" ] || { echo "error: mindformers $version is not in the matrix (${!mindspore[*]})" >&2; exit 1; }
    environment=$folder/mindformers-$version
    if [ ! -e "$environment/.complete" ]; then
        echo "== mindformers $version, mindspore $pair: installing"
        "$python" -m venv --clear "$environment"
        "$environment/bin/pip" install --quiet "mindspore==$pair" "mindformers==$version" "safetensors>=0.4.2" \
            "sentencepiece>=0.2.0" "tokenizers>=0.15" "pyyaml>=6.0" "matplotlib>=3.7" "zstandard>=0.22" "numpy<2" \
            pytest pytest-timeout "hypothesis<7"
        touch "$environment/.complete"
    fi
    echo "== mindformers $version, mindspore $pair: testing"
    result=passed
    "$environment/bin/python" -m pytest -q "${tests[@]}" </dev/null || { result=FAILED; failed=1; }
    summary+=("mindformers $version  mindspore $pair  $result")
done
printf '%s\n' "${summary[@]}"
exit "$failed"
