"""Fine-tune, evaluate or predict from a recipe, with the options of MindFormers' own run_mindformer.py.

    python run_mindformer.py --config research/telechat/finetune_telechat_7b.yaml --register_path research/telechat \
        --train_dataset DIR --load_checkpoint FILE
"""
import sys

from research.telechat.commands.run import program as main

if __name__ == "__main__":
    sys.exit(main())
