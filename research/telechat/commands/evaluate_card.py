"""The parts of the command `evaluate` for --card and --judge: what is at hand, answers, judgments. See evaluate.py."""
import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Tuple

from tqdm import tqdm

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
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
        raise ConfigError("--card: no benchmark is at hand; "
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
    """Answers and judgments of earlier runs, beside the report. Raises ConfigError."""
    return (Store(output.with_name(f"{output.stem}.answers.jsonl"), "answers"),
            Store(output.with_name(f"{output.stem}.judgments.jsonl"), "judgments"))


def run_judged(lm: "TelechatLM", benches: List[Bench], kept: Tuple[Store, Store], args: argparse.Namespace,
               identity: JsonObject, first: bool) -> Dict[str, JsonObject]:
    """Each benchmark's `Outcome` by its name: our answers, then the judgments. Raises ConfigError: no judge answers."""
    answers, judgments = kept
    found: Dict[str, JsonObject] = {}
    for bench in benches:
        given = answer_all(lm, bench, answers, digest(identity), args.system, first)
        if not first:
            continue
        asked: List[Tuple[Messages, JsonObject]] = []
        categories = []
        for question in bench.questions:
            for turn, messages in enumerate(question.judge(given[question.number]), 1):
                asked.append((messages, {"bench": bench.name, "question": question.number, "turn": turn}))
                categories.append(question.category)
        judge = Judge(args.judge_url, args.judge_model)
        with tqdm(total=len(asked), desc=f"judgments of {bench.name}", unit="text") as bar:
            texts = judge_all(judge, judgments, asked, args.judge_parallel, bar)
        found[bench.name] = outcome(bench, zip(categories, texts))._asdict()
    return found
