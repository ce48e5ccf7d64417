#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model that answers, on a CPU: makes the environment (see env.sh), then runs
# scripts/quickstart.py. Running it again reuses what is done.
#
#   bash scripts/quickstart.sh            everything goes to quickstart_output/
#   bash scripts/quickstart.sh --fresh    start over
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

for argument in "$@"; do
    case $argument in
        --fresh) ;;
        -h | --help) sed -n '2,7{/^#/{s/^# \{0,1\}//;p}}' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) telechat_die "unknown argument $argument; the only one is --fresh." ;;
    esac
done
telechat_env
cd "$TELECHAT_ROOT"
exec "$PYTHON" scripts/quickstart.py "$@"
