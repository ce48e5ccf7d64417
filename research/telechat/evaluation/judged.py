"""Questions whose answers a judge rates: AlignBench and MT-bench, from the files they are published as.

Prompts, dimensions, references and temperatures come from the user's copy of each benchmark; none are shipped here:

    DIR/AlignBench      a clone of its repository: questions in its data, dimensions and temperatures in its config, and
                        the prompt as a text in its script (read, not run), or in a file of its own
    DIR/mt_bench        FastChat's folder of llm_judge's data: questions, judge_prompts, reference_answer
"""
import ast
import json
import re
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject

Messages = List[Dict[str, str]]
ALIGN_GROUPS = {"reasoning": ("数学计算", "逻辑推理")}      # of AlignBench's categories; all others are language
# FastChat's llm_judge: sampling of answers by category, categories whose judge sees a reference answer.
MT_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
MT_REFERENCED = ("math", "reasoning", "coding", "arena-hard-200")


class Question(NamedTuple):
    """One question, of one turn or two."""

    number: str
    category: str
    turns: Tuple[str, ...]
    temperature: float                              # for the answer; 0: the likeliest tokens
    judge: Callable[[Sequence[str]], List[Messages]]         # messages for the judge, of each turn's answer


class Bench(NamedTuple):
    """A benchmark: its questions, how a judgment is parsed, and how ratings become a score."""

    name: str
    questions: List[Question]
    rating: Callable[[str], Optional[float]]        # of a judgment, 1 to 10; None: it has none
    score: Callable[[Dict[str, List[float]]], Optional[float]]     # of the ratings by category


def read_bench(name: str, data: Optional[str]) -> Bench:
    """A benchmark by its name, from the folder of --data. Raises ConfigError: unknown, or files that are missing."""
    readers = {"alignbench": _read_align, "mt_bench": _read_mt}
    if name not in readers:
        raise ConfigError(f"--judge: expected {' or '.join(readers)}, found {name!r}")
    names = {"alignbench": "AlignBench", "mt_bench": "mt_bench"}
    if not data:
        raise ConfigError(f"--judge: {name} needs --data DIR with its published files in DIR/{names[name]} (see "
                          "docs/evaluation.md)")
    known = {path.name.lower(): path for path in Path(data).iterdir() if path.is_dir()} if Path(data).is_dir() else {}
    if names[name].lower() not in known:
        raise ConfigError(f"--data: {data} has no folder {names[name]} with the published files of {name} (see "
                          "docs/evaluation.md)")
    return readers[name](known[names[name].lower()])


def _file(folder: Path, *names: str) -> Path:
    """The first of these files that exists. Raises ConfigError."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(f"--data: {folder} has no {' or '.join(names)}")
    return found


def _text(path: Path) -> str:
    """A file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--data: {path} cannot be read as UTF-8: {err}") from err


def _json(path: Path) -> JsonObject:
    try:
        found = json.loads(_text(path))
    except ValueError as err:
        raise ConfigError(f"--data: {path}: not valid JSON ({err})") from err
    if not isinstance(found, dict):
        raise ConfigError(f"--data: {path}: expected an object, found {type(found).__name__}")
    return found


def _lines(path: Path, needed: Sequence[str]) -> List[JsonObject]:
    """The records of a .jsonl file, each with the fields `needed`. Raises ConfigError."""
    records = []
    for number, line in enumerate(_text(path).split("\n"), 1):       # U+2028 may occur in a text
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as err:
            raise ConfigError(f"--data: {path}, line {number}: not valid JSON ({err})") from err
        lacking = [name for name in needed if not isinstance(record, dict) or name not in record]
        if lacking:
            raise ConfigError(f"--data: {path}, line {number}: expected the fields {', '.join(needed)}; "
                              f"{', '.join(lacking)} missing")
        records.append(record)
    if not records:
        raise ConfigError(f"--data: {path} is empty")
    return records


def _read_align(folder: Path) -> Bench:
    questions = _lines(_file(folder, "data/data_v1.1_release.jsonl", "data/data_release.jsonl"),
                       ("question_id", "category", "subcategory", "question", "reference"))
    kinds = _json(_file(folder, "config/subcategory_question_mapping.json"))
    sets = _json(_file(folder, "config/dimension_set.json"))
    meanings = _json(_file(folder, "config/dimension_definition.json"))
    temperatures = _json(_file(folder, "config/temperature.json"))
    template = _align_prompt(folder)
    found = []
    for record in questions:
        kind = kinds.get(str(record["subcategory"]))
        if kind not in sets:
            raise ConfigError(f"--data: {folder}: question {record['question_id']} is of {record['subcategory']!r}, "
                              "for which config/ lists no dimensions")
        dimensions = "".join(f"{number}. {name}: {meanings.get(name)}\n" for number, name in enumerate(sets[kind], 1))
        fields = {"category": record["category"], "dimensions": dimensions, "question": record["question"],
                  "reference": record["reference"]}

        def judge(answers: Sequence[str], fields: JsonObject = fields) -> List[Messages]:
            return [[{"role": "user", "content": _filled(template, {**fields, "answer": answers[0]}, folder)}]]
        found.append(Question(str(record["question_id"]), str(record["category"]), (str(record["question"]),),
                              float(temperatures.get(record["category"], 0)), judge))
    return Bench("alignbench", found, align_rating, align_score)


def _align_prompt(folder: Path) -> str:
    """The prompt of AlignBench's judge: judge_prompt.txt, or the text base_prompt in judge.py."""
    path = _file(folder, "judge_prompt.txt", "judge.py")
    source = _text(path)
    if path.suffix == ".txt":
        return source
    try:
        for node in ast.walk(ast.parse(source)):
            if (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str)
                    and any(isinstance(target, ast.Name) and target.id == "base_prompt" for target in node.targets)):
                return node.value.value
    except SyntaxError as err:
        raise ConfigError(f"--data: {path}: not a Python file ({err})") from err
    raise ConfigError(f"--data: {path} has no string base_prompt; write the judge's prompt to "
                      f"{folder / 'judge_prompt.txt'}")


def _filled(template: str, fields: JsonObject, where: Path) -> str:
    try:
        return template.format(**fields)
    except (KeyError, IndexError, ValueError) as err:
        raise ConfigError(f"--data: {where}: the judge's prompt has an unknown field: {err}; known fields: "
                          f"{', '.join(fields)}") from err


def align_rating(text: str) -> Optional[float]:
    """The 综合得分 in the last braces of a judgment, or anywhere."""
    braces = re.findall(r"\{[^{}]*\}", text)
    for place in [*braces[-1:], text]:
        found = re.search(r"['\"]综合得分['\"]\s*[:：]\s*(\d+(?:\.\d+)?)", place)
        if found:
            return float(found.group(1))
    return None


def align_score(ratings: Dict[str, List[float]]) -> Optional[float]:
    """Half the mean of the two reasoning categories, half that of the others; each category counts once."""
    means = {category: sum(each) / len(each) for category, each in ratings.items() if each}
    reasoning = [mean for category, mean in means.items() if category in ALIGN_GROUPS["reasoning"]]
    language = [mean for category, mean in means.items() if category not in ALIGN_GROUPS["reasoning"]]
    halves = [sum(each) / len(each) for each in (reasoning, language) if each]
    return sum(halves) / len(halves) if halves else None


def _read_mt(folder: Path) -> Bench:
    questions = _lines(_file(folder, "question.jsonl", "mt_bench/question.jsonl"), ("question_id", "category", "turns"))
    prompts = {record["name"]: record for record in _lines(_file(folder, "judge_prompts.jsonl"), (
        "name", "system_prompt", "prompt_template"))}
    references: Dict[str, List[str]] = {}
    for path in sorted([*folder.glob("reference_answer/*.jsonl"), *folder.glob("mt_bench/reference_answer/*.jsonl")]):
        for record in _lines(path, ("question_id", "choices")):
            try:
                answers = record["choices"][0]["turns"]
            except (KeyError, IndexError, TypeError):
                answers = None
            references.setdefault(str(record["question_id"]), _turns(answers, path, record, "choices[0].turns"))
    wanted = [name + end for name in ("single-v1", "single-math-v1") for end in ("", "-multi-turn")]
    lacking = [name for name in wanted if name not in prompts]
    if lacking:
        raise ConfigError(f"--data: {folder}/judge_prompts.jsonl has no prompt named {', '.join(lacking)}")
    found = []
    for record in questions:
        number, turns = str(record["question_id"]), _turns(record["turns"], folder, record, "turns")
        reference = references.get(number) if record["category"] in MT_REFERENCED else None
        if record["category"] in MT_REFERENCED and (reference is None or len(reference) < len(turns)):
            raise ConfigError(f"--data: {folder}: question {number} ({record['category']}) has no reference answer in "
                              "reference_answer/*.jsonl")

        def judge(answers: Sequence[str], turns: List[str] = turns, reference: Optional[List[str]] = reference
                  ) -> List[Messages]:
            name = "single-v1" if reference is None else "single-math-v1"
            fields: JsonObject = {"question": turns[0], "answer": answers[0]}
            for place, values in (("question", turns), ("answer", answers), ("ref_answer", reference or [])):
                fields.update({f"{place}_{at}": value for at, value in enumerate(values, 1)})
            return [[{"role": "system", "content": prompts[each]["system_prompt"]},
                     {"role": "user", "content": _filled(prompts[each]["prompt_template"], fields, folder)}]
                    for each in [name, f"{name}-multi-turn"][:len(turns)]]
        found.append(Question(number, str(record["category"]), tuple(turns),
                              MT_TEMPERATURES.get(str(record["category"]), 0.0), judge))
    return Bench("mt_bench", found, mt_rating, mean_score)


def _turns(found: object, path: Path, record: JsonObject, name: str) -> List[str]:
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"--data: {path}: question {record['question_id']}: expected {name} to be strings, found "
                          f"{str(found)[:80]}")
    return found


def mt_rating(text: str) -> Optional[float]:
    """The number in [[ ]], or in [ ]."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found.group(1)) if found else None


def mean_score(ratings: Dict[str, List[float]]) -> Optional[float]:
    """The mean of all ratings of all turns."""
    flat = [rating for each in ratings.values() for rating in each]
    return sum(flat) / len(flat) if flat else None


class Outcome(NamedTuple):
    """The score of a benchmark."""

    score: Optional[float]
    questions: int
    judgments: int
    unread: int                      # judgments without a rating; they do not count
    categories: Dict[str, float]     # means


def outcome(bench: Bench, judgments: Iterable[Tuple[str, str]]) -> Outcome:
    """The score from (category, text of the judgment) of each turn."""
    ratings: Dict[str, List[float]] = {}
    count = unread = 0
    for category, text in judgments:
        count += 1
        rating = bench.rating(text)
        if rating is None:
            unread += 1
        else:
            ratings.setdefault(category, []).append(rating)
    means = {category: sum(each) / len(each) for category, each in sorted(ratings.items())}
    return Outcome(bench.score(ratings), len(bench.questions), count, unread, means)
