"""Answer the questions of a file, or chat in the terminal.

    python research/telechat/run_telechat_predict.py --input_file examples/input.json \
        --yaml_file research/telechat/predict_telechat_12b.yaml --vocab_file_path tokenizer.model \
        --checkpoint_path telechat_12b.ckpt

The lines of the file, {"input": question}, are the turns of one conversation (--multi_turn False: each is separate; a
line with "history", a list of messages, starts a new one from those). Answers are printed and written to --output_file,
one JSON object per line. --interactive opens a chat instead.
"""
import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

from research.telechat.chat import interrupt
from research.telechat.chat.session import Session
from research.telechat.common.command import run_command
from research.telechat.common.console import only_own_warnings
from research.telechat.common.environment import rank
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, prepare_log, refuse_foreign
from research.telechat.common.lock import output_lock
from research.telechat.common.printable import one_line, printable
from research.telechat.common.versions import fitting_versions
from research.telechat.recipe.options import add_sampling_options, or_none, overrides_of, parse_further, str2bool
from research.telechat.recipe.read import check_overrides, read_recipe, resolve_config
from research.telechat.text.messages import Tools


class Question(NamedTuple):
    """One line of the input file."""

    line: int
    text: str
    history: Optional[List[JsonObject]] = None       # None: the conversation so far
    fault: str = ""                                      # what is wrong with the line, if anything


def build_parser() -> argparse.ArgumentParser:
    """All options. Defaults that are empty leave the recipe as it is."""
    parser = argparse.ArgumentParser(description="Answer the questions of a file with TeleChat, or chat.",
                                     epilog="Keys of the recipe can be set as in run_mindformer.py: "
                                            "--model.model_config.seq_length 4096.")
    add = parser.add_argument
    add("--input_file", default="", help='JSON lines, {"input": question}')
    add("--yaml_file", default="", help="predict recipe, e.g. research/telechat/predict_telechat_12b.yaml")
    add("--vocab_file_path", default="", help="tokenizer.model or tokenizer.json; default: that of the recipe")
    add("--checkpoint_path", dest="load_checkpoint", type=or_none(str), help="checkpoint; default: that of the recipe")
    add("--use_parallel", type=str2bool, help="run as one of several processes (msrun)")
    add("--auto_trans_ckpt", type=str2bool, help="shard a complete checkpoint for the parallel plan")
    add("--use_past", type=str2bool, help="keep keys and values of earlier tokens (KV cache)")
    add("--start_token", help="marker in front of every prompt")
    add("--user_token", help="marker before a question; default: that of the model's family")
    add("--bot_token", help="marker before an answer; default: that of the model's family")
    add("--end_token", help="marker that ends an answer; default: that of the model's family")
    add("--interactive", type=str2bool, nargs="?", const=True, default=False, help="chat in the terminal")
    add("--multi_turn", type=str2bool, default=True, help="the lines are turns of one conversation; default: True")
    add("--system", help="system prompt")
    add("--tools_file", help="JSON list of tools that the model may call (TeleChat2)")
    add("--generation_config", default="", help="generation_config.json, or the folder that holds it")
    add("--output_file", default="", help="JSON lines of the answers; default: telechat_predict.jsonl in output_dir")
    add("--overwrite", action="store_true", help="replace --output_file even if this command did not write it")
    add("--output_dir", help="folder of logs and results")
    add_sampling_options(parser)
    add("--stop", nargs="+", default=[], help="texts that end an answer")
    add("--seed", type=int, help="random seed; the same seed gives the same answers")
    return parser


def read_questions(path: str) -> List[Question]:
    """The lines of an input file; invalid ones carry their error. ConfigError: no such file, or nothing in it."""
    if not path:
        raise ConfigError("--input_file is missing; pass a file of JSON lines, or --interactive")
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as err:
        raise ConfigError(f"--input_file: {path} cannot be read: {err.strerror or err}; pass a file of JSON "
                          "lines") from err
    questions = [_question(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise ConfigError(f'--input_file: {path} is empty; expected lines such as {{"input": "question"}}')
    return questions


def _question(number: int, line: bytes) -> Question:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        return Question(number, "", fault=f"not valid JSON ({err})")
    if not isinstance(record, dict) or not isinstance(record.get("input"), str) or not record["input"].strip():
        return Question(number, "", fault=f'expected {{"input": "question"}}, found {str(record)[:80]}')
    history = record.get("history")
    if history is not None and not (isinstance(history, list) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str) for message in history)):
        return Question(number, "", fault="history must be a list of messages with role and content")
    return Question(number, record["input"], history)


def answer_file(session: Session, questions: List[Question], args: argparse.Namespace, tools: Tools, output: Path,
                show: bool) -> int:
    """Answer all questions; returns how many could not be. Each answer is on disk before the next question."""
    from research.telechat.chat.session import bot_message, parse_tool_calls, with_question
    from research.telechat.common.errors import ConversationError
    history: List[JsonObject] = []
    failed = 0
    with _lines(output, show) as write:
        for place, question in enumerate(questions):
            fault = question.fault
            if not fault:
                if question.history is not None or not args.multi_turn:
                    history = question.history or []
                messages, rendered = with_question(history, question.text, args.system)
                try:
                    seed = None if args.seed is None else args.seed + place
                    answer = "".join(session.answer(rendered, tools, seed))
                except ConversationError as err:
                    fault = str(err)
            if fault:
                failed += 1
                print(one_line(f"error: {args.input_file}, line {question.line}: {fault}"), file=sys.stderr, flush=True)
                write({"line": question.line, "error": fault})
                continue
            history = [*messages, bot_message(answer)]
            record = {"line": question.line, "input": question.text, "output": answer, **session.report.as_dict()}
            if session.report.reasoning:
                record["reasoning_content"] = session.report.reasoning
            if tools:
                record["tool_calls"] = parse_tool_calls(answer, tools=tools).calls
            write(record)
            if show:
                print(printable(f"question: {question.text}\nanswer: {answer}\n截至目前的聊天记录是: {history}\n"),
                      flush=True)
    return failed


def is_answers(path: Path) -> bool:
    """Whether a file is one of answers, as this command writes them."""
    try:
        with path.open(encoding="utf-8") as file:
            record = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "line" in record and bool({"output", "error"} & record.keys())


@contextlib.contextmanager
def _lines(path: Path, active: bool) -> Iterator[Callable[[JsonObject], None]]:
    """A function that writes a record as a line. The file appears under its name when all is done, or interrupted."""
    if not active:
        yield lambda record: None
        return
    part = path.with_name(path.name + ".part")
    with output_lock(path), part.open("w", encoding="utf-8") as file:
        def write(record: JsonObject) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
        try:
            yield write
        finally:
            file.close()
            os.replace(part, path)


def run(args: argparse.Namespace, rest: List[str]) -> int:
    """Answer or chat; returns the exit code. Raises ConfigError."""
    if args.interactive and args.use_parallel:
        raise ConfigError("--interactive needs a single process; leave --use_parallel out")
    questions = [] if args.interactive else read_questions(args.input_file)
    if not args.yaml_file:
        raise ConfigError("--yaml_file is missing; pass a predict recipe, e.g. "
                          "research/telechat/predict_telechat_12b.yaml")
    tools = read_tools(args.tools_file)
    overrides = {**overrides_of(args, ["load_checkpoint", "use_parallel", "auto_trans_ckpt", "output_dir", "use_past"]),
                 **parse_further(rest)}
    check_overrides(read_recipe(resolve_config(args.yaml_file)), overrides)
    prepare_log(overrides.get("output_dir"))
    if args.interactive:
        only_own_warnings()
    with fitting_versions():
        from research.telechat.chat.api import make_session, read_generation_config
        from research.telechat.run.load import load_model, prepare_prediction, quieten
        from research.telechat.run.preflight import model_config
        from research.telechat.text.renderer import Renderer, choose_template
    config, tokenizer = prepare_prediction(args.yaml_file, overrides, args.vocab_file_path)
    template = choose_template(tokenizer.vocab, model_config(config).chat_template)
    output = Path(args.output_file or Path(config.output_dir) / "telechat_predict.jsonl")
    if not args.interactive and rank() == 0:
        refuse_foreign([output], is_answers, args.overwrite)
    renderer = Renderer(template, tokenizer.vocab, start_token=args.start_token,
                        user_token=args.user_token, bot_token=args.bot_token, end_token=args.end_token)
    changes = {key: getattr(args, key) for key in ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p",
                                                   "repetition_penalty") if getattr(args, key) is not None}
    generation = read_generation_config(args.generation_config) if args.generation_config else None
    quieten()
    session = make_session(load_model(config), tokenizer, generation, args.stop, renderer, **changes)
    session.next_tokens = interrupt.checked(session.next_tokens)
    interrupt.check()
    if args.interactive:
        from research.telechat.chat.terminal import Terminal
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing for input())
        Terminal(lambda messages, seed: session.pieces(messages, tools, seed), lambda: session.report, sys.stdout,
                 args.system, args.seed, "compiling ...").run(ask)
        return 0
    first = rank() == 0
    failed = answer_file(session, questions, args, tools, output, first)
    if first:
        print(f"{len(questions) - failed} of {len(questions)} questions answered; written to {output}", flush=True)
    return 1 if failed else 0


def ask(prompt: str) -> str:
    """A line from the terminal; Ctrl-C interrupts it."""
    with interrupt.released():
        return input(prompt)


def read_tools(path: Optional[str]) -> Optional[List[JsonObject]]:
    """The tools of a file. Raises ConfigError."""
    if not path:
        return None
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        raise ConfigError(f"--tools_file: {path} cannot be read as JSON: {err}; expected a list of tools") from err
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"--tools_file: {path} must hold a list of tools, each a JSON object; found "
                          f"{type(tools).__name__}{' of other things' if isinstance(tools, list) else ''}")
    return tools


def main(argv: Optional[List[str]] = None) -> int:
    """Run; returns the exit code (common/command.py)."""
    def body() -> int:
        args, rest = build_parser().parse_known_args(argv)
        for stream in (sys.stdout, sys.stdin):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="replace")
        os.environ.setdefault("GLOG_v", "3")                 # of MindSpore's messages, errors only
        with interrupt.held():
            return run(args, rest)
    return run_command(body)
