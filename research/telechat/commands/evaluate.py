"""Evaluate a converted checkpoint: tasks of lm-evaluation-harness, or the perplexity of texts.

    python scripts/evaluate.py --config research/telechat/predict_telechat_12b.yaml --load_checkpoint CKPT \
        --tokenizer DIR --tasks ceval-valid,gsm8k --num_fewshot 5 --output output/evaluation.json

Prints a table; writes a JSON report and, next to it, a bar chart. Names, data and checkpoint are checked before the
model is loaded. On several cards: scripts/msrun_launcher.sh, with --use_parallel True; every process gets the same
requests, the first one writes. See docs/evaluation.md.
"""
import argparse
import contextlib
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from research.telechat.commands.evaluate_card import (
    AtHand,
    answer_benches,
    at_hand,
    check_shared,
    judge_benches,
    leave_out_scored,
    limited,
    stores,
    weights_of,
)
from research.telechat.commands.help_text import HelpFormatter
from research.telechat.common.command import run_command
from research.telechat.common.environment import rank, writes
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, json_text, prepare_log, read_json_object, refuse_foreign
from research.telechat.common.lock import output_lock
from research.telechat.common.printable import one_line, printable
from research.telechat.common.versions import fitting_versions
from research.telechat.evaluation.answers import DEFAULT_THINKING
from research.telechat.evaluation.card import CardRow, card_rows, card_table, draw_card, published_for
from research.telechat.evaluation.judge import Judge, digest
from research.telechat.evaluation.judged import read_bench
from research.telechat.evaluation.needs import check_programs, check_reasoning
from research.telechat.evaluation.report import (
    Row,
    draw_bars,
    judged_table,
    result_rows,
    result_table,
    samples_path,
    versions,
    write_results,
)
from research.telechat.evaluation.tasks import count_documents, harness_version, load_tasks, set_shots
from research.telechat.evaluation.texts import Record, parts_of, read_records
from research.telechat.recipe.options import overrides_of, parse_further, str2bool
from research.telechat.recipe.read import check_overrides, read_recipe, resolve_config
from research.telechat.text.renderer import Renderer, choose_template

if TYPE_CHECKING:
    from research.telechat.evaluation.harness import TelechatLM
    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_tokenizer import TelechatTokenizer


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description="Evaluate a TeleChat checkpoint.", allow_abbrev=False,
                                     formatter_class=HelpFormatter,
                                     epilog="Keys of the recipe can be set as in run_mindformer.py: "
                                            "--model.model_config.seq_length 4096.")
    add = parser.add_argument
    add("--config", default="", help="predict recipe, e.g. research/telechat/predict_telechat_12b.yaml")
    add("--load_checkpoint", default="", help="converted checkpoint; default: that of the recipe")
    add("--tokenizer", default="", help="tokenizer.model, tokenizer.json or the folder that holds it; default: that "
                                        "of the recipe")
    add("--tasks", default="", help="names of tasks, separated by commas, e.g. ceval-valid,cmmlu,mmlu,gsm8k,bbh")
    add("--card", action="store_true", help="instead of tasks: the benchmarks of the model card whose data is present, "
                                            "next to the published figures of the recipe's model")
    add("--judge", default="", help="instead of tasks: alignbench, mt_bench or both, rated by the model at --judge_url")
    add("--judge_url", default="", help="of a server with OpenAI's chat API, e.g. http://host:8000/v1; its key comes "
                                        "from TELECHAT_JUDGE_KEY or OPENAI_API_KEY")
    add("--judge_model", default="gpt-4", help="name of the judge's model there")
    add("--judge_parallel", type=int, default=4, help="concurrent requests to the judge")
    add("--perplexity", default="", help="instead of tasks: texts or conversations, in a file or folder that "
                                         "preprocessing reads")
    add("--num_fewshot", type=int, help="few-shot examples before each question; default: the task's")
    add("--limit", type=float, help="number of questions per task; below 1: a fraction of them")
    add("--batch_size", type=int, default=8, help="requests computed together")
    add("--include_path", help="folder with task files (YAML) of your own")
    add("--data", help="folder with data sets as files, used instead of the hub")
    add("--data_only", action="store_true", help="load the data of the tasks, count the questions, and stop")
    add("--allow_code_execution", action="store_true", help="run the programs that the model writes (HumanEval, MBPP), "
                                                            "in isolation; see docs/evaluation.md")
    add("--apply_chat_template", action="store_true", help="ask as in a chat, with the markers of the model's family")
    add("--system", help="system prompt, with --apply_chat_template")
    add("--thinking_tokens", type=int, default=DEFAULT_THINKING, help="for the reasoning before each answer, of models "
                                                                      "that reason; it is not scored")
    add("--seed", type=int, default=1234, help="seed for choosing examples and for sampling")
    add("--output", default="output/evaluation.json", help="report; the chart gets the same name with .png")
    add("--overwrite", action="store_true", help="replace --output and the files next to it even if this "
                                                   "command did not write them")
    add("--samples", action="store_true", help="also write every question with its answer")
    add("--use_parallel", type=str2bool, help="run as one of several processes (msrun)")
    add("--auto_trans_ckpt", type=str2bool, help="shard a complete checkpoint for the parallel plan")
    add("--output_dir", help="folder of logs")
    return parser


def check(args: argparse.Namespace) -> List[str]:
    """The names of the tasks. Raises ConfigError for errors visible from the command line alone."""
    names = task_names(args)
    if sum(map(bool, (names, args.perplexity, args.card, args.judge))) != 1:
        raise ConfigError("pass either --tasks NAME,NAME or --perplexity FILE or --card or --judge NAME"
                          + ("" if names else "; tasks are, for example, ceval-valid, cmmlu, mmlu, gsm8k and bbh"))
    if args.judge and not args.judge_url:
        raise ConfigError("--judge needs --judge_url, the server of the model that rates the answers")
    if args.judge_url:
        Judge(args.judge_url, args.judge_model)              # rejects a bad address or key before any answer is made
    if args.judge_parallel < 1:
        raise ConfigError(f"--judge_parallel: expected a positive whole number, found {args.judge_parallel}")
    if args.card and args.num_fewshot is not None:
        raise ConfigError("--card sets the number of examples of each benchmark; leave --num_fewshot out")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ConfigError(f"--num_fewshot: expected 0 or more, found {args.num_fewshot}")
    if args.limit is not None and args.limit <= 0:
        raise ConfigError(f"--limit: expected a positive number, found {args.limit:g}")
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size: expected a positive whole number, found {args.batch_size}")
    if args.thinking_tokens < 1:
        raise ConfigError(f"--thinking_tokens: expected a positive whole number, found {args.thinking_tokens}")
    if not 0 <= args.seed < 2 ** 31:
        raise ConfigError(f"--seed: expected a whole number from 0 to 2^31 - 1, found {args.seed}")
    if args.system and not args.apply_chat_template and not args.judge:
        raise ConfigError("--system needs --apply_chat_template: without it there is no system prompt")
    output = Path(args.output)
    if output.is_dir() or output.suffix != ".json":
        raise ConfigError(f"--output: expected the name of a .json file, found {args.output}")
    beside = [output.with_suffix(".png"), *([samples_path(output)] if args.samples else [])]
    refuse_foreign([output, *beside], lambda _: is_report(output), args.overwrite)
    if args.data_only:
        return names
    if not args.config:
        raise ConfigError("--config is missing; pass a predict recipe, e.g. "
                          "research/telechat/predict_telechat_12b.yaml")
    checkpoint = args.load_checkpoint or read_recipe(resolve_config(args.config)).get("load_checkpoint")
    if not checkpoint:
        raise ConfigError("--load_checkpoint is missing, and the recipe names no checkpoint either; give one made by "
                          "research/telechat/convert_weight_torch_to_ms.py")
    if args.load_checkpoint and not Path(args.load_checkpoint).exists():
        raise ConfigError(f"--load_checkpoint: {args.load_checkpoint} does not exist; convert the official weights "
                          "first (research/telechat/convert_weight_torch_to_ms.py)")
    return names


def task_names(args: argparse.Namespace) -> List[str]:
    """The names in --tasks."""
    return [name.strip() for name in args.tasks.split(",") if name.strip()]


def is_report(path: Path) -> bool:
    """Whether a file is a report of this command."""
    try:
        return {"checkpoint", "tokenizer_sha256", "recipe"} <= read_json_object(path, "report").keys()
    except ConfigError:
        return False


def open_model(args: argparse.Namespace, rest: List[str], found: AtHand) -> Any:
    """(model, tokenizer, complete recipe). Raises ConfigError, also for tasks that the model cannot be asked."""
    options = ["use_parallel", "auto_trans_ckpt", "output_dir", *(["load_checkpoint"] if args.load_checkpoint else [])]
    overrides = {**overrides_of(args, options), **parse_further(rest)}
    check_overrides(read_recipe(resolve_config(args.config)), overrides)
    prepare_log(overrides.get("output_dir"))
    with fitting_versions():
        from research.telechat.run.load import load_model, prepare_prediction, quieten
    config, tokenizer = prepare_prediction(args.config, overrides, args.tokenizer)
    if found.benches:
        found.weights = weights_of(Path(config.load_checkpoint))      # loading may name another place
    quieten()
    from research.telechat.run.preflight import model_config
    template = choose_template(tokenizer.vocab, model_config(config).chat_template)
    if args.apply_chat_template and template.think_start is not None:
        if args.card:
            leave_out_scored(found)
        elif found.loaded:
            check_reasoning(found.loaded)
    return load_model(config), tokenizer, config


def run_tasks(lm: "TelechatLM", loaded: JsonObject, args: argparse.Namespace, first: bool, programs: bool
              ) -> JsonObject:
    """The harness's result. programs: tasks run generated programs, in isolation."""
    import numpy as np
    from lm_eval.evaluator import evaluate
    kept = set_shots(loaded, args.num_fewshot, args.seed)
    if kept and first:
        print(one_line(f"--num_fewshot does not apply to {len(kept)} tasks that bring their own examples: "
                       + ", ".join(kept[:5]) + (", ..." if len(kept) > 5 else "")), flush=True)
    random.seed(args.seed)
    np.random.seed(args.seed)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")      # forking next to MindSpore's threads would hang
    limit = int(args.limit) if args.limit is not None and args.limit >= 1 else args.limit
    result: JsonObject = evaluate(
        lm=lm, task_dict=loaded, limit=limit, log_samples=args.samples, bootstrap_iters=1000,
        system_instruction=args.system, apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.apply_chat_template, confirm_run_unsafe_code=programs)
    return {**result, "chat_template": lm.chat_template(args.apply_chat_template)}


def run_perplexity(model: "TelechatForCausalLM", tokenizer: "TelechatTokenizer", records: List[Record],
                   args: argparse.Namespace, first: bool) -> JsonObject:
    """Counts, loss per token, perplexity, bits per byte."""
    from research.telechat.evaluation.score import Scorer, perplexity_of
    bos = tokenizer.bos_token_id
    template = choose_template(tokenizer.vocab, model.config.chat_template)
    renderer = Renderer(template, tokenizer.vocab, system_policy="prepend")
    parts = parts_of(records, renderer, tokenizer.eos_token_id if bos is None else bos, model.config.seq_length)
    result = perplexity_of(Scorer(model, args.batch_size, first), parts)
    if parts.unscored:
        result["notes"] = {"tokens at the beginning of answers longer than seq_length are not scored": parts.unscored}
    return result


def prepare(args: argparse.Namespace, names: List[str]) -> AtHand:
    """Tasks and judged benchmarks with their data. Raises ConfigError for everything that is missing."""
    if args.card:
        print(f"loading the benchmarks of the model card with lm-evaluation-harness {harness_version()}", flush=True)
        return at_hand(args)
    if args.judge:
        if not args.data_only:
            harness_version()                                # which answers are generated through
        return AtHand({}, [read_bench(name.strip(), args.data) for name in args.judge.split(",")])
    if not names:
        return AtHand({}, [])
    print(one_line(f"loading {', '.join(names)} with lm-evaluation-harness {harness_version()}"), flush=True)
    loaded = load_tasks(names, args.include_path, args.data)
    return AtHand(loaded, [], programs=not args.data_only and check_programs(loaded, args.allow_code_execution))


def measure(args: argparse.Namespace, found: AtHand, kept: Any, opened: Any, report: JsonObject, first: bool
            ) -> Tuple[JsonObject, Dict[str, JsonObject]]:
    """(result of the harness, outcomes of the judged benchmarks by name); `notes` of the report: truncations."""
    with fitting_versions():
        from research.telechat.evaluation.harness import TelechatLM
    model, tokenizer, _ = opened
    lm = TelechatLM(model, tokenizer, args.batch_size, args.seed, first, args.thinking_tokens)
    result = run_tasks(lm, found.loaded, args, first, found.programs) if found.loaded else {}
    judged: Dict[str, JsonObject] = {}
    if found.benches:
        answers, judgments = kept
        if not first:
            check_shared(Path(args.output))
        given = answer_benches(lm, found.benches, answers, args, identity_of(args, found, report), first)
        if first:                                            # nothing that the other processes would wait for
            judged = judge_benches(found, given, judgments, args)
    report["notes"] = dict(lm.counts)
    return result, judged


def identity_of(args: argparse.Namespace, found: AtHand, report: JsonObject) -> JsonObject:
    """What the answers to judged benchmarks depend on: answers of another model or recipe are not reused."""
    names = ("changes", "checkpoint", "tokenizer_sha256", "seq_length", "compute_dtype", "seed", "thinking_tokens")
    return {**{key: report[key] for key in names}, "weights": found.weights,
            "recipe": digest(json_text(read_recipe(resolve_config(args.config))))}


def run(args: argparse.Namespace, rest: List[str]) -> int:
    """Evaluate; returns the exit code. Raises ConfigError."""
    names, output = check(args), Path(args.output)
    records = read_records(args.perplexity) if args.perplexity else []
    found = prepare(args, names)
    if args.data_only:
        for name, count in [*count_documents(found.loaded).items(),
                            *((bench.name, len(bench.questions)) for bench in found.benches)]:
            print(one_line(f"{name}: {count} questions"))
        return 0
    found.benches = limited(found.benches, args.limit)
    with contextlib.ExitStack() as held:
        if writes():
            held.enter_context(output_lock(output))          # answers and judgments are written meanwhile
        return evaluate(args, rest, found, records)


def evaluate(args: argparse.Namespace, rest: List[str], found: AtHand, records: List[Record]) -> int:
    """Measure what was found, print it, and write it; the exit code. The lock of the output is held."""
    names, output = task_names(args), Path(args.output)
    kept = stores(output) if found.benches else None
    started = time.time()
    model, tokenizer, config = opened = open_model(args, rest, found)
    first = rank() == 0
    report: JsonObject = {
        "recipe": args.config, "changes": rest, "checkpoint": str(config.load_checkpoint),
        "tokenizer": str(tokenizer.vocab.path), "tokenizer_sha256": tokenizer.vocab.fingerprint,
        "tasks": names or list(found.loaded.get("tasks", {})), "seq_length": model.config.seq_length,
        "compute_dtype": str(model.config.compute_dtype), "device": config.context.device_target,
        "batch_size": args.batch_size, "num_fewshot": args.num_fewshot, "limit": args.limit, "system": args.system,
        "seed": args.seed, "thinking_tokens": args.thinking_tokens, "packages": versions()}
    samples, rows, shown = None, [], []
    if args.perplexity:
        report.update(perplexity_of=args.perplexity, **run_perplexity(model, tokenizer, records, args, first))
        shown = ["\n".join(f"{key}: {report[key]:.6g}" for key in ("texts", "tokens", "loss_per_token", "perplexity",
                                                                   "bits_per_byte"))]
    else:
        result, judged = measure(args, found, kept, opened, report, first)
        samples = result.pop("samples", None)
        report.update(result)
        rows = result_rows(result) if result else []
        if rows:
            shown.append(result_table(rows))
        if judged:
            report.update(judge={"url": args.judge_url, "model": args.judge_model}, judged=judged)
            shown.append(judged_table(judged))
    if not first:
        return 0
    cards = card_rows(report, report.get("judged", {}), args.apply_chat_template, published_for(args.config),
                      found.missing) if args.card else []
    if cards:
        report["card"] = [row._asdict() for row in cards]
        shown.append(card_table(cards))
    report["seconds"] = round(time.time() - started, 1)
    print(printable("\n\n".join(shown)), flush=True)
    for note, count in report.get("notes", {}).items():
        print(one_line(f"note: {count} {note}"))
    written = write(output, report, rows, samples, cards)
    print("written: " + ", ".join(map(str, written)), flush=True)
    return 0


def write(output: Path, report: JsonObject, rows: List[Row], samples: Optional[JsonObject],
          cards: List[CardRow]) -> List[Path]:
    """Write report, samples and chart; returns their paths. Raises ConfigError."""
    chart = output.with_suffix(".png")
    written = [output] if samples is None else [output, samples_path(output)]
    try:
        write_results(output, report, samples)
        if draw_card(cards, chart) if cards else draw_bars(rows, chart):
            written.append(chart)
    except OSError as err:
        raise ConfigError(f"--output: {output} cannot be written: {err.strerror or err}") from err
    except ImportError:
        print("no chart: matplotlib is not installed")
    return written


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    os.environ.setdefault("GLOG_v", "3")                     # of MindSpore's messages, errors only
    return run_command(lambda: run(*build_parser().parse_known_args(argv)))
