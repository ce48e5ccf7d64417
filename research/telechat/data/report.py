"""The report of preprocessing: totals, the printed text, report.json and the length histogram. No tokens, no files."""
from collections import Counter
from typing import Dict, List, Optional, Tuple

import numpy as np

from research.telechat.common.files import JsonObject
from research.telechat.common.picture import ACCENT, DARK, LIGHT, drawing, png

_BINS = 4096                                 # resolution of the length histogram in memory
SHOWN_ERRORS = 100                           # unusable records that are listed individually
_KEYS = 50                                   # unused keys listed per file, and of them on the terminal:
_SHOWN_KEYS, _SHOWN_FILES = 8, 10
_CHINESE = {"Lengths of {count} conversations": "{count} 段对话的长度分布",
            "Lengths of {count} documents": "{count} 篇文档的长度分布",
            "Lengths of {count} conversations and documents": "{count} 段对话和文档的长度分布",
            "tokens in a document": "每篇文档的 token 数", "documents": "文档数",
            "tokens in a conversation or document": "每段对话或每篇文档的 token 数",
            "conversations and documents": "对话和文档数",
            "tokens in a conversation": "每段对话的 token 数",
            "conversations": "对话数", " (last bar: {least} or more)": "（最后一柱：{least} 及以上）",
            "max_length {length}: a record holds {limit} tokens": "max_length {length}：每条记录 {limit} 个 token"}


class Report:
    """Collects the counts of all chunks (data.encoding.Encoded), in bounded memory."""

    def __init__(self, limit: int):
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.errors: List[str] = []          # the first SHOWN_ERRORS
        self.unusable = 0                    # records that could not be used
        self.unused: Dict[str, Counter[str]] = {}            # by file: unused keys of its records
        self.ignored: List[str] = []         # files of the input folders that are not data
        self._width = max(limit // 256, 1)   # tokens per bin
        self._lengths = np.zeros(_BINS + 1, np.int64)
        self._longest = 0

    def add(self, counts: Dict[str, int], lengths: np.ndarray, file: str = "",
            unused: Optional[Dict[str, int]] = None) -> None:
        """Add one chunk of `file`."""
        self.counts.update(counts)
        keys: Counter[str] = self.unused.setdefault(file, Counter()) if unused else Counter()
        for key, count in (unused or {}).items():
            keys[key if key in keys or len(keys) < _KEYS else "other keys"] += count
        if len(lengths):
            self._lengths += np.bincount(np.minimum(lengths // self._width, _BINS), minlength=_BINS + 1)
            self._longest = max(self._longest, int(lengths.max()))

    def add_error(self, error: str) -> bool:
        """Count an unusable record; returns whether to list it on the terminal."""
        self.unusable += 1
        if self.unusable > SHOWN_ERRORS:
            return False
        self.errors.append(error)
        return True

    def summary(self, records: int, seconds: float) -> JsonObject:
        """The contents of report.json. `records`: rows written; `seconds`: wall time so far."""
        counts = self.counts
        slots = records * self.limit
        written = counts["tokens kept"] + counts["tokens repeated"]
        return {
            "records_read": counts["records"],
            **({"documents_read": counts["documents"]} if counts["documents"] else {}),
            "conversations": {
                "read": counts["conversations"],
                "kept_whole": counts["whole"],
                "split": counts["split"],
                "truncated": counts["truncated"],
                "dropped": self._group("dropped: "),
                "unusable_records": self._group("unusable: "),
                "notes": self._group("note: "),
            },
            "tokens": {
                "read": counts["tokens"],
                "kept": counts["tokens kept"],
                "dropped": counts["tokens dropped"],
                "repeated_as_context": counts["tokens repeated"],
                "answer": counts["answer tokens"],
                "written": written,
                "padding": slots - written,
            },
            "padding_share": round((slots - written) / slots, 6) if slots else 0.0,
            "records_written": records,
            "pieces_per_record": round(counts["pieces"] / records, 3) if records else 0.0,
            "conversation_length": self._length_summary(),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(counts["tokens"] / seconds) if seconds > 0 else 0,
            "megabytes_per_second": round(counts["bytes"] / seconds / 1e6, 3) if seconds > 0 else 0,
            "unusable_first": self.errors,
            "unused_keys": {file: dict(keys) for file, keys in self.unused.items()},
            "ignored_files": self.ignored,
        }

    def _unit(self) -> Tuple[str, str]:
        """What the records are: conversations, documents or both, in the singular and the plural."""
        documents = self.counts["documents"]
        if not documents:
            return "conversation", "conversations"
        alone = documents == self.counts["conversations"]
        return ("document", "documents") if alone else ("conversation or document", "conversations and documents")

    def _group(self, prefix: str) -> Dict[str, int]:
        return {name[len(prefix):]: count for name, count in sorted(self.counts.items()) if name.startswith(prefix)}

    def _length_summary(self) -> Dict[str, int]:
        """Mean, quantiles and maximum; quantiles are accurate to the bin width."""
        total = int(self._lengths.sum())
        if not total:
            return {}
        behind = np.cumsum(self._lengths)
        bins = {share: int(np.searchsorted(behind, total * share / 100)) + 1 for share in (50, 90, 99)}
        quantiles = {f"p{share}": min(number * self._width, self._longest) for share, number in bins.items()}
        return {"mean": round(self.counts["tokens"] / total), **quantiles, "max": self._longest}

    def histogram_png(self, language: str = "en") -> Optional[bytes]:
        """The length histogram as a PNG; None without lengths or matplotlib."""
        unit, units = self._unit()
        used = np.flatnonzero(self._lengths)
        if not len(used):
            return None
        per_bar = -(-int(used[-1] + 1) // 100)               # at most 100 bars
        counts = np.add.reduceat(self._lengths[:used[-1] + 1], np.arange(0, used[-1] + 1, per_bar))
        width = per_bar * self._width
        try:
            with drawing((7, 4), _CHINESE, language) as (figure, word):
                axes = figure.add_subplot()
                axes.bar(np.arange(len(counts)) * width, counts, width=width, align="edge", color=LIGHT, edgecolor=DARK,
                         linewidth=0.5)
                axes.axvline(self.limit, color=ACCENT, linestyle="--", linewidth=1.5,
                             label=word("max_length {length}: a record holds {limit} tokens",
                                        length=f"{self.limit - 1:,}", limit=f"{self.limit:,}"))
                axes.legend()
                axes.set_title(word(f"Lengths of {{count}} {units}", count=f"{int(self._lengths.sum()):,}"))
                axes.set_xlabel(word(f"tokens in a {unit}") + (
                    word(" (last bar: {least} or more)", least=_BINS * self._width) if self._lengths[-1] else ""))
                axes.set_ylabel(word(units))
                return png(figure)
        except ImportError:
            return None


def format_report(summary: JsonObject) -> str:
    """The report for the terminal."""
    conversations, tokens = summary["conversations"], summary["tokens"]
    dropped, unusable = conversations["dropped"], conversations["unusable_records"]
    documents, read = summary.get("documents_read", 0), conversations["read"]
    units = "conversations" if not documents else "documents" if documents == read else "conversations and documents"
    trained = "answers" if not documents else "with loss"
    lines = [
        f"read       {summary['records_read']:,} records, {read:,} {units}, "
        f"{tokens['read']:,} tokens",
        f"kept       {conversations['kept_whole']:,} whole, {conversations['split']:,} split, "
        f"{conversations['truncated']:,} truncated; {tokens['kept']:,} tokens "
        f"({tokens['answer']:,} of them {trained}), {tokens['repeated_as_context']:,} repeated as context",
        f"dropped    {sum(dropped.values()):,} {units}{_reasons(dropped)}; {tokens['dropped']:,} tokens",
        f"unusable   {sum(unusable.values()):,} records{_reasons(unusable)}",
    ]
    lines += [f"note       {count:,} x {note}" for note, count in conversations["notes"].items()]
    for file, keys in list(summary["unused_keys"].items())[:_SHOWN_FILES]:
        shown = [f"{_name(key)} ({count:,})" for key, count in list(keys.items())[:_SHOWN_KEYS]]
        rest = len(keys) - len(shown)
        lines.append(f"not used   {file}: keys {', '.join(shown)}" + (f" and {rest} more" if rest else ""))
    if len(summary["unused_keys"]) > _SHOWN_FILES:
        lines.append(f"not used   keys of {len(summary['unused_keys']) - _SHOWN_FILES} more files, see report.json")
    lines += [
        f"written    {summary['records_written']:,} records of {summary['pieces_per_record']} {units} or parts, "
        f"padding {summary['padding_share']:.2%}",
        f"time       {summary['seconds']:.1f} s, {summary['tokens_per_second']:,} tokens/s, "
        f"{summary['megabytes_per_second']:.1f} MB/s",
    ]
    return "\n".join(lines)


def ignored_line(files: List[str]) -> str:
    """The message about files of the input folders that are not data."""
    rest = len(files) - _SHOWN_FILES
    return f"ignored    files that are not data ({len(files):,}): {', '.join(files[:_SHOWN_FILES])}" + (
        f" and {rest} more" if rest > 0 else "")


def _name(key: str) -> str:
    return key[:40] if key.isprintable() else ascii(key[:40])


def _reasons(counts: Dict[str, int]) -> str:
    return f" ({', '.join(f'{reason}: {count:,}' for reason, count in counts.items())})" if counts else ""
