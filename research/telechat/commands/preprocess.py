"""Conversations and texts to a MindRecord data set for training: the command. What it does is in the modules it joins.

    python research/telechat/telechat_preprocess.py --input_dataset_file data.jsonl --output_path OUT \
        --vocab_file_path tokenizer.model --max_length 2048

See docs/data.md for formats, options and what comes out. It needs no NPU, and of MindSpore only the writer.
"""
import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Sequence

import numpy as np
from tqdm import tqdm

from research.telechat.commands.help_text import HelpFormatter
from research.telechat.common.command import run_command
from research.telechat.common.environment import cores
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, write_text
from research.telechat.common.picture import LANGUAGES, prepare_drawing
from research.telechat.common.printable import one_line, printable
from research.telechat.data.budget import TokenBudget
from research.telechat.data.encoding import Encoded, Encoder, source_formats
from research.telechat.data.meta import REPORT_FILE
from research.telechat.data.packing import LONG_MODES, FirstFitPacker, ShuffleBuffer, pack_all, to_records
from research.telechat.data.records import DATA_FORMATS
from research.telechat.data.report import Report, format_report, ignored_line
from research.telechat.data.sources import Source, find_sources, read_chunks, read_evenly, total_bytes
from research.telechat.data.workers import Aside, ordered_map
from research.telechat.data.writer import DatasetWriter
from research.telechat.spec.variants import VARIANTS, get_variant
from research.telechat.text.renderer import Renderer, detect_template, get_template
from research.telechat.text.templates import TEMPLATES
from research.telechat.text.vocab import Vocab

_SHORTEST = 8                                # --max_length; below, no question and answer fit
_CHUNK_BYTES = 1 << 19


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The options; see `--help`."""
    parser = argparse.ArgumentParser(description="Create a MindRecord data set from conversations and texts.",
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--input_dataset_file", nargs="+", required=True, metavar="PATH",
        help="files (.jsonl, .json, also .gz or .zst; .csv, .parquet, .arrow, .txt), folders of them, or a JSON file "
        "that lists files (with weights)")
    add("--output_path", required=True, metavar="DIR", help="folder for the data set and the report")
    add("--vocab_file_path", required=True, metavar="FILE", help="tokenizer.model or tokenizer.json of the model")
    add("--max_length", type=int, default=2048, help="seq_length of the recipe; records are one token longer")
    add("--seed", type=int, default=2024, help="for the order of the conversations and texts")
    add("--model_name", choices=list(VARIANTS), help="model whose template to use; default: by the vocabulary")
    add("--template", choices=list(TEMPLATES), help="name of the template, instead of --model_name")
    for role in ("start", "user", "bot", "end", "pad"):
        add(f"--{role}_token", help="marker in front of each conversation; default: none" if role == "start" else
            "replaces the template's marker")
    add("--format", choices=["auto", *DATA_FORMATS], default="auto",
        help="format of the records; auto: detected from their keys; text: documents, trained on every token")
    add("--long", choices=LONG_MODES, default="split", help="what to do with conversations and texts longer than a "
        "record")
    add("--overlap", type=int, default=1, help="tokens shared by two pieces of a long text, without loss in the second")
    add("--txt_documents", choices=["file", "line"], default="file", help="what is a document of a .txt file")
    add("--max_tokens", type=int, default=None, help="write at most this number of tokens without padding, from all "
        "files in proportion; default: all")
    add("--system_prompt", choices=["ignore", "prepend", "error"], default="ignore",
        help="if the template has no system prompt: drop and count it, put it before the first question, or refuse")
    add("--padding_side", choices=["left", "right"], help="default: as the family's official code")
    add("--document_boundaries", action="store_true",
        help="store where each conversation ends (column actual_seq_len), so that they do not attend to each other")
    add("--max_documents", type=int, default=128, help="length of that column: at most this number of documents per "
        "record, counting padding as one")
    add("--max_errors", type=int, default=100, help="stop at this number of unusable records; -1: never")
    add("--shuffle_buffer", type=int, default=8192, help="conversations to shuffle among; 0: keep the order")
    add("--pack_window", type=int, default=256, help="records that are filled at the same time")
    add("--file_megabytes", type=int, default=2048, help="start a new file after this number of megabytes of tokens")
    add("--overwrite", action="store_true", help="replace existing files in DIR that this command did not write")
    add("--lang", choices=LANGUAGES, default="en", help="language of lengths.png")
    add("--num_workers", type=int, default=None, help="processes that tokenise; default: one per core")
    args = parser.parse_args(argv)
    args.num_workers = cores() if args.num_workers is None else args.num_workers
    for name, least in (("max_length", _SHORTEST), ("num_workers", 0), ("max_errors", -1), ("shuffle_buffer", 0),
                        ("pack_window", 1), ("file_megabytes", 1), ("max_documents", 2)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}; the least is {least}")
    if args.model_name and args.template not in (None, get_variant(args.model_name).chat_template):
        raise ConfigError(f"--model_name {args.model_name} has another template than --template {args.template}; name "
                          "only one of them")
    if not 0 <= args.overlap <= args.max_length // 2:
        raise ConfigError(f"--overlap is {args.overlap}; expected a number from 0 to half of --max_length, "
                          f"{args.max_length // 2}")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ConfigError(f"--max_tokens is {args.max_tokens}; the least is 1")
    return args


def make_renderer(args: argparse.Namespace) -> Renderer:
    """The renderer that the options describe. Raises ConfigError."""
    vocab = Vocab.load(args.vocab_file_path)
    name = args.template or (get_variant(args.model_name).chat_template if args.model_name else None)
    return Renderer(get_template(name) if name else detect_template(vocab), vocab, start_token=args.start_token,
                    user_token=args.user_token, bot_token=args.bot_token, end_token=args.end_token,
                    pad_token=args.pad_token, system_policy=args.system_prompt)


def preprocess(args: argparse.Namespace) -> dict:
    """Make the data set; returns the report. Raises ConfigError and WorkerError, and then leaves nothing behind."""
    started = time.perf_counter()
    ignored: List[Path] = []
    sources = find_sources(args.input_dataset_file, ignored)
    if args.txt_documents == "line":
        sources = [source._replace(lines=True) for source in sources]
    if ignored:
        print(one_line(ignored_line([str(path) for path in ignored])))
    renderer = make_renderer(args)
    formats = source_formats(sources, None if args.format == "auto" else args.format)
    length = args.max_length + 1
    slots = args.max_documents if args.document_boundaries else 0
    side = args.padding_side or renderer.template.padding_side
    columns = {"input_ids": length, "labels": length, **({"actual_seq_len": slots} if slots else {})}
    encoder = Encoder(renderer, formats, length, args.long, named=args.format != "auto", overlap=args.overlap)
    report = Report(length)
    report.ignored = [str(path) for path in ignored]
    packer = FirstFitPacker(length, args.pack_window, slots - 1 if slots else length, args.seed)
    shuffle = ShuffleBuffer(args.shuffle_buffer, args.seed)
    budget = TokenBudget(args.max_tokens)
    with DatasetWriter(Path(args.output_path), columns, args.file_megabytes << 20, args.overwrite) as writer, Aside(
            prepare_drawing, partial(_picture, args.lang), args.num_workers > 1) as picture:
        chunks = read_chunks(sources, args.seed, _CHUNK_BYTES) if args.max_tokens is None else read_evenly(
            sources, args.seed, min(max(args.max_tokens // 16, 1 << 10), _CHUNK_BYTES))
        results = ordered_map(partial(_itself, encoder), chunks, args.num_workers)
        pieces = _pieces(results, sources, report, args.max_errors, budget)
        packs = pack_all(_then(pieces, partial(picture.start, report)), shuffle, packer)
        for record in to_records(packs, length, renderer.pad_id, side, slots):
            writer.add(record)
        if not writer.records:
            raise ConfigError(_nothing(sources, report))
        summary = _summary(report, writer, started, budget)
        extra = {"lengths.png": picture.result(report)}
        files = writer.finish(_meta(args, renderer, side, summary), extra)
        summary = _summary(report, writer, started, budget)
        write_text(Path(args.output_path) / REPORT_FILE, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    return {**summary, "files": [str(file) for file in files]}


def _then(pieces: Iterator[np.ndarray], call: Callable[[], object]) -> Iterator[np.ndarray]:
    """The pieces; behind the last one, while the buffers are emptied, `call` is called."""
    yield from pieces
    call()


def _picture(language: str, report: Report) -> Optional[bytes]:
    return report.histogram_png(language)


def _itself(encoder: Encoder) -> Encoder:
    return encoder


def _summary(report: Report, writer: DatasetWriter, started: float, budget: TokenBudget) -> JsonObject:
    summary = report.summary(writer.records, time.perf_counter() - started)
    bound = {} if budget.most is None else {"max_tokens": budget.most, "max_tokens_reached": budget.spent}
    return {**summary, **bound}


def _pieces(results: Iterator[Encoded], sources: List[Source], report: Report, max_errors: int,
            budget: TokenBudget) -> Iterator[np.ndarray]:
    """The pieces of all chunks within the budget; counts, shows progress, and stops at too many unusable records."""
    with tqdm(total=total_bytes(sources), unit="B", unit_scale=True, desc="preprocess", mininterval=0.5) as bar:
        for encoded in map(budget.take, results):
            report.add(encoded.counts, encoded.lengths, str(sources[encoded.source].path), encoded.unused)
            bar.update(encoded.progress)
            for number, error in encoded.errors:
                named = f"{sources[encoded.source].path}:{number}: {error}"
                if report.add_error(named):
                    tqdm.write(one_line(named), file=sys.stderr)
                if max_errors >= 0 and report.unusable >= max(max_errors, 1):
                    raise ConfigError(f"stopped at {report.unusable} records that cannot be used, named above; correct "
                                      "them, name the right --format, or allow more with --max_errors")
            yield from encoded.pieces()
            if budget.spent:
                return


def _nothing(sources: List[Source], report: Report) -> str:
    reasons = "; ".join(report.errors[:1]) or ", ".join(
        name for name in report.counts if name.startswith("dropped: ")) or "the files hold no records"
    return f"no usable conversation in {sources[0].path}{' and others' if len(sources) > 1 else ''}: {reasons}"


def _meta(args: argparse.Namespace, renderer: Renderer, side: str, summary: dict) -> dict:
    """What training has to know; the same for the same input and options, wherever and whenever it is made."""
    markers = {role: getattr(renderer, f"{role}_id") for role in ("start", "user", "bot", "system", "end", "pad")}
    documents = summary.get("documents_read", 0)
    alone = documents == summary["conversations"]["read"]            # then no template is in it
    budget = {key: summary[key] for key in ("max_tokens", "max_tokens_reached") if key in summary}
    return {
        "template": "" if alone else renderer.template.name, "markers_as_text": renderer.as_text,
        "seq_length": args.max_length, "record_length": args.max_length + 1,
        "tool_marker_ids": sorted(renderer.kept_ids),
        "tokenizer": renderer.vocab.path.name, "tokenizer_sha256": renderer.vocab.fingerprint,
        "vocab_size": renderer.vocab.size, "marker_ids": markers, "pad_token_id": renderer.pad_id,
        "padding_side": side, "long": args.long, "seed": args.seed, "system_prompt": args.system_prompt,
        "conversations": summary["conversations"], "tokens": summary["tokens"],
        "conversation_length": summary["conversation_length"],
        **({"documents": documents, "overlap": args.overlap} if documents else {}), **budget,
    }


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    return run_command(partial(_run, argv), "nothing was written", "use fewer processes (--num_workers)")


def _run(argv: Optional[Sequence[str]]) -> None:
    summary = preprocess(parse_arguments(argv))
    unnamed = sum(summary["conversations"]["unusable_records"].values()) - len(summary["unusable_first"])
    if unnamed:
        print(f"... and {unnamed} more records that cannot be used", file=sys.stderr)
    print(printable(format_report(summary)))
    if "max_tokens" in summary:
        reached = "reached; what was not read or left out is not trained" if summary["max_tokens_reached"] else (
            "not reached: there is no more input")
        print(f"budget     {summary['max_tokens']:,} tokens, {reached}")
    print(f"data set   {', '.join(summary['files'])}")
    print(f"details    {Path(summary['files'][0]).parent}: meta.json, report.json, lengths.png")
