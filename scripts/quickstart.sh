#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model that answers, on a CPU: makes the environment (see env.sh), then runs
# scripts/quickstart.py. Running it again keeps what is done.
#
#   bash scripts/quickstart.sh                   everything goes to quickstart_output/
#   bash scripts/quickstart.sh --from finetune   repeats a step and those after it: tokenizer, dataset,
#                                                official_checkpoint, mindspore_checkpoint, finetune, predict
#   bash scripts/quickstart.sh --fresh           starts over
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

for argument in "$@"; do                # before anything is installed; quickstart.py does the rest
    case $argument in
        --fresh | --from | tokenizer | dataset | official_checkpoint | mindspore_checkpoint | finetune | predict) ;;
        -h | --help) sed -n '2,9{/^#/{s/^# \{0,1\}//;p}}' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) telechat_die "unknown argument $argument; known are --fresh, and --from with the name of a step (--help)." ;;
    esac
done
telechat_env serve
exec "$PYTHON" "$TELECHAT_ROOT/scripts/quickstart.py" "$@"
