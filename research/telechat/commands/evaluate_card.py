"""The parts of the command `evaluate` for --card and --judge: benchmarks, answers, judgments. See evaluate.py."""
import argparse
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple

from tqdm import tqdm

from research.telechat.checkpoint.integrity import checks_of
from research.telechat.common.environment import rank
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.common.lock import lock_path
from research.telechat.evaluation.asking import answer_all
from research.telechat.evaluation.card import BENCHMARKS
from research.telechat.evaluation.judge import Judge, Store, digest, judge_all
from research.telechat.evaluation.judged import Bench, Messages, outcome, read_bench
from research.telechat.evaluation.needs import check_programs, check_reasoning
from research.telechat.evaluation.sandbox import CODE_EVAL
from research.telechat.evaluation.tasks import load_tasks, set_shots

if TYPE_CHECKING:
    from research.telechat.evaluation.harness import TelechatLM


@dataclass
class AtHand:
    """What can be run."""

    loaded: JsonObject                                       # tasks, as the harness takes them
    benches: List[Bench]                                     # those with a judge
    missing: Dict[str, str] = field(default_factory=dict)    # why others of the card cannot, by their names there
    programs: bool = False                                   # some tasks run generated programs
    parts: Dict[str, JsonObject] = field(default_factory=dict)       # `loaded` by benchmark of the card
    weights: List[Tuple[str, int, object]] = field(default_factory=list)     # `weights_of` the checkpoint


def at_hand(args: argparse.Namespace) -> AtHand:
    """The benchmarks of the card whose data, packages, permission and judge there are. ConfigError: none is."""
    found = AtHand({}, [])
    for bench in BENCHMARKS:
        task = bench.chat_task if args.apply_chat_template else bench.task
        try:
            if bench.judged:
                if not args.judge_url:
                    raise ConfigError("no judge (--judge_url)")
                found.benches.append(read_bench(task, args.data))
                continue
            part = load_tasks([task], args.include_path, args.data, only_files=bool(args.data))
            if not args.data_only:
                found.programs |= check_programs(part, args.allow_code_execution)
            if bench.shots is not None:
                set_shots(part, bench.shots, args.seed)
            found.parts[bench.name] = part
        except ConfigError as err:
            found.missing[bench.name] = str(err)
    if not found.parts and not found.benches:
        raise ConfigError("--card: no benchmark can be run; "
                          + "; ".join(f"{name}: {why}" for name, why in found.missing.items()))
    CODE_EVAL.allowed = found.programs
    _merge(found)
    return found


def _merge(found: AtHand) -> None:
    found.loaded.clear()
    for part in found.parts.values():
        for key, values in part.items():
            found.loaded.setdefault(key, {}).update(values)


def leave_out_scored(found: AtHand) -> None:
    """Leave out what scores log-likelihoods, for a model that is asked as a chat and reasons before it answers."""
    for name, part in list(found.parts.items()):
        try:
            check_reasoning(part)
        except ConfigError as err:
            found.missing[name] = str(err)
            del found.parts[name]
    _merge(found)


def stores(output: Path) -> Tuple[Store, Store]:
    """Answers and judgments of earlier runs, next to the report. Raises ConfigError."""
    return (Store(output.with_name(f"{output.stem}.answers.jsonl"), "answers"),
            Store(output.with_name(f"{output.stem}.judgments.jsonl"), "judgments"))


def limited(benches: Sequence[Bench], limit: Optional[float]) -> List[Bench]:
    """Benchmarks with the first questions only, as the harness limits its tasks: a number, or a share below 1."""
    return [bench if limit is None else bench._replace(
        questions=bench.questions[:ceil(len(bench.questions) * limit) if limit < 1 else int(limit)])
            for bench in benches]


def weights_of(checkpoint: Path) -> List[Tuple[str, int, object]]:
    """What tells the weights of a checkpoint from others at its path, without reading them: (path in it, bytes, hash)
    of each file; where no hash is known, the time of its last change. Raises CheckpointError: a broken manifest."""
    files = [checkpoint] if checkpoint.is_file() else sorted(
        path for path in checkpoint.rglob("*") if path.suffix in (".ckpt", ".safetensors"))
    known = {check.path: check.digest for check in checks_of(files)}
    states = [(path, path.stat()) for path in files]
    return [(str(path.relative_to(checkpoint.parent)), state.st_size, known.get(path, state.st_mtime_ns))
            for path, state in states]


def check_shared(output: Path) -> None:
    """Raise ConfigError where this process does not see what the first one of the job has: the lock of `output`, held
    by then. It would not know the answers of an earlier run, and wait for others to generate them with it."""
    if not lock_path(output).exists():
        raise ConfigError(f"--output: process {rank()} does not see the folder of {output} that the first process "
                          "writes; on several machines, judged benchmarks need --output on a file system they share")


def answer_benches(lm: "TelechatLM", benches: List[Bench], answers: Store, args: argparse.Namespace,
                   identity: JsonObject, first: bool) -> List[Dict[str, List[str]]]:
    """Our answers to each benchmark, on all processes of the job, since all of them compute each answer."""
    return [answer_all(lm, bench, answers, digest(identity), args.system, first) for bench in benches]


def judge_bench(bench: Bench, given: Dict[str, List[str]], judgments: Store, args: argparse.Namespace) -> JsonObject:
    """The `Outcome` of our answers to a benchmark. Raises ConfigError: the judge does not answer."""
    asked: List[Tuple[Messages, JsonObject]] = []
    categories = []
    for question in bench.questions:
        for turn, messages in enumerate(question.judge(given[question.number]), 1):
            asked.append((messages, {"bench": bench.name, "question": question.number, "turn": turn}))
            categories.append(question.category)
    judge = Judge(args.judge_url, args.judge_model)
    with tqdm(total=len(asked), desc=f"judgments of {bench.name}", unit="text") as bar:
        texts = judge_all(judge, judgments, asked, args.judge_parallel, bar)
    return outcome(bench, zip(categories, texts))._asdict()


def judge_benches(found: AtHand, given: List[Dict[str, List[str]]], judgments: Store, args: argparse.Namespace
                  ) -> Dict[str, JsonObject]:
    """`judge_bench` by the benchmarks' names. With --card, those that cannot be judged become `missing`, so that the
    report of the others is written. Raises ConfigError: without --card, the judge does not answer."""
    judged: Dict[str, JsonObject] = {}
    names = {bench.task: bench.name for bench in BENCHMARKS if bench.judged}
    for bench, answers in zip(found.benches, given):
        try:
            judged[bench.name] = judge_bench(bench, answers, judgments, args)
        except ConfigError as err:
            if not args.card:
                raise
            found.missing[names[bench.name]] = str(err)
    return judged
