"""From the official examples and the official 12B tokenizer to a trained model that predicts."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden import SHARED, needs_shared

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--model.model_config.seq_length", "256", "--model.model_config.vocab_size", "120000",
         "--model.model_config.num_layers", "2", "--model.model_config.hidden_size", "64",
         "--model.model_config.intermediate_size", "96", "--model.model_config.num_heads", "4"]


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, check=False, timeout=800, env={**os.environ, "GLOG_v": "3"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@needs_shared
@pytest.mark.slow
def test_train_on_the_official_examples(tmp_path):
    """Conversations, and the text for pre-training, in one set and one run."""
    tokenizer = SHARED / "data/telechat-12b/tokenizer.model"
    run("research/telechat/telechat_preprocess.py", "--input_dataset_file",
        SHARED / "data/sft/multi_turn_example.jsonl", SHARED / "data/text/pretrain_example.jsonl", "--output_path",
        tmp_path / "data", "--vocab_file_path", tokenizer, "--max_length", 256)
    report = json.loads((tmp_path / "data/report.json").read_text(encoding="utf-8"))
    assert (report["documents_read"], report["conversations"]["read"]) == (20, 1020)
    run("run_mindformer.py", "--config", "research/telechat/finetune_telechat_tiny_cpu.yaml", "--register_path",
        "research/telechat", "--train_dataset", tmp_path / "data", "--output_dir", tmp_path / "out", *SIZES,
        "--num_samples", "40", "--epochs", "1", "--lr_schedule.warmup_ratio", "0.0", "--lr_schedule.learning_rate",
        "0.01")
    log = [json.loads(line) for line in (tmp_path / "out/training_log.jsonl").read_text().splitlines()]
    assert len(log) == 10 and log[-1]["loss"] < log[0]["loss"] - 0.5
    checkpoints = list((tmp_path / "out/checkpoint/rank_0").glob("*.ckpt"))
    assert len(checkpoints) == 1
    run("run_mindformer.py", "--config", "research/telechat/predict_telechat_tiny_cpu.yaml", "--register_path",
        "research/telechat", "--load_checkpoint", checkpoints[0], "--predict_data", "<_user>生抽与老抽的区别？<_bot>",
        "--processor.tokenizer.vocab_file", tokenizer, "--output_dir", tmp_path / "predict", *SIZES,
        "--model.model_config.max_new_tokens", "8")
    result = (tmp_path / "predict/text_generation_result.txt").read_text(encoding="utf-8")
    assert "生抽与老抽的区别" in result
