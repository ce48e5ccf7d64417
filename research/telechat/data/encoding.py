"""From raw records to pieces of token ids: the work of one worker process of preprocessing.

Combines data/records.py, text/renderer.py, data/assembly.py, data/packing.py and data/documents.py for one chunk of
records, with one call to the vocabulary for all its texts, and counts what happens to the records.
"""
from collections import Counter
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from research.telechat.common.errors import ConfigError, ConversationError, RecordError
from research.telechat.data.assembly import assemble
from research.telechat.data.documents import TEXT, Document, cut_document
from research.telechat.data.markers import NO_REASONING
from research.telechat.data.packing import WHOLE, Cut, cut
from research.telechat.data.records import Conversation, detect_format, parse_any
from research.telechat.data.sources import Chunk, Source, peek_records
from research.telechat.data.texts import is_text
from research.telechat.text.messages import divided
from research.telechat.text.renderer import BOT, TOOL, Plan, Renderer

UNREASONED = "answer without reasoning, trained after an empty reasoning block"
UNNAMED_MARKERS = ("tool markers written as ordinary text: no tokenizer_config.json next to the vocabulary "
                   "names their tokens")
ALONE = "answer trained in a conversation of its own, without the reasoning of earlier ones"


class Encoded(NamedTuple):
    """A chunk of records as pieces. `counts`: totals by name; `errors`: (line, why it cannot be used)."""

    source: int
    tokens: np.ndarray                       # int32, all pieces concatenated, as data/packing.py writes them
    sizes: np.ndarray                        # int32, tokens of each piece
    lengths: np.ndarray                      # int32, tokens of each conversation or document before splitting
    counts: Dict[str, int]
    unused: Dict[str, int]                   # keys of the records that were not used
    errors: List[Tuple[int, str]]
    progress: int
    fresh: np.ndarray                        # int32, of each piece: its tokens that are in no earlier piece
    owners: np.ndarray                       # int32, of each piece: the conversation or document, index in `lengths`
    fates: List[str]                         # of each conversation or document, as counted

    def pieces(self) -> List[np.ndarray]:
        """The pieces, each copied, so that keeping one does not keep the whole chunk in memory."""
        ends = np.cumsum(self.sizes)
        return [self.tokens[end - size:end].copy() for end, size in zip(ends.tolist(), self.sizes.tolist())]


class Encoder:
    """Encodes chunks. Picklable, for worker processes.

    Args:
        renderer: writes the conversations.
        formats: the data format of each source (see `source_formats`).
        named: the user chose it; if not, each record's own keys take precedence.
        limit: tokens of one record, N + 1.
        long: what to do with longer records (data.packing.LONG_MODES).
        overlap: tokens that the pieces of a long document share (data.documents.cut_document).
    """

    def __init__(self, renderer: Renderer, formats: Sequence[str], limit: int, long: str = "split",
                 named: bool = False, overlap: int = 1):
        self.renderer, self.formats, self.limit, self.long = renderer, list(formats), limit, long
        self.named, self.overlap = named, overlap

    def __call__(self, chunk: Chunk) -> Encoded:
        counts: Counter[str] = Counter(records=len(chunk.records), bytes=sum(map(len, chunk.records)))
        counts.update(f"note: {note}" for note in chunk.notes)
        unused: Counter[str] = Counter()
        errors: List[Tuple[int, str]] = []
        plans: List[Plan] = []
        documents: List[bool] = []               # of each plan
        data_format = self.formats[chunk.source]
        for number, raw in zip(chunk.numbers, chunk.records):
            try:
                record = parse_any(raw, data_format, self.named)
                plans += self._plans(record)
            except RecordError as err:
                counts[f"unusable: {err.kind}"] += 1
                errors.append((number, str(err)))
                continue
            except ConversationError as err:
                counts["unusable: order or kind of messages"] += 1
                errors.append((number, str(err)))
                continue
            documents += [isinstance(record, Document)] * (len(plans) - len(documents))
            for note in self._notes(record):
                counts[f"note: {note}"] += 1
            for key in record.unused:
                unused[key] += 1
            if not isinstance(record, Document) and record.messages[0].role == "system" and (
                    self.renderer.system_id is None):
                counts[f"note: system prompt, policy {self.renderer.system_policy!r}"] += 1
        encoded = iter(self.renderer.vocab.encode_arrays([text for plan in plans for text in plan.texts]))
        conversations = assemble(plans, encoded, self.renderer.opening)
        pieces: List[np.ndarray] = []
        fresh: List[int] = []
        owners: List[int] = []
        fates: List[str] = []
        whole = conversations.trained & (conversations.lengths <= self.limit)
        bounds = conversations.bounds.tolist()
        for number, (start, end, fits) in enumerate(zip(bounds, bounds[1:], whole.tolist())):
            marked = conversations.marked[start:end]
            if fits:                             # as nearly always: counted below, all at once
                pieces.append(marked)
                fresh.append(end - start)
                owners.append(number)
                fates.append(WHOLE)
                continue
            result = cut_document(marked, self.limit, self.long, self.overlap) if documents[number] else cut(
                conversations.layout(number), marked, self.limit, self.long)
            pieces += result.pieces
            fresh += result.fresh
            owners += [number] * len(result.pieces)
            fates.append(_count(counts, result, end - start))
        number, tokens = int(whole.sum()), int(conversations.lengths[whole].sum())
        counts.update({"conversations": number, "tokens": tokens, "tokens kept": tokens, "tokens dropped": 0,
                       "tokens repeated": 0, "pieces": number, WHOLE: number, "documents": sum(documents)})
        joined = np.concatenate([np.zeros(0, np.int32), *pieces])
        counts["answer tokens"] = int(np.count_nonzero(joined >= 0))
        sizes = np.array([len(piece) for piece in pieces], np.int32)
        return Encoded(chunk.source, joined, sizes, conversations.lengths.astype(np.int32), dict(counts), dict(unused),
                       errors, chunk.progress, np.array(fresh, np.int32), np.array(owners, np.int32), fates)

    def _plans(self, record: Union[Conversation, Document]) -> List[Plan]:
        """What to train of a record. Raises ConversationError."""
        if isinstance(record, Document):
            return [self.renderer.document(record.text, record.ends, record.train)]
        return [self.renderer.plan(part, record.tools) for part in self.renderer.conversations(record.messages)]

    def _notes(self, conversation: Union[Conversation, Document]) -> List[str]:
        """The notes of a record, of its tools and, if the template supports reasoning, of its answers."""
        if isinstance(conversation, Document):
            return list(conversation.notes)
        if self.renderer.unnamed_tool_markers and (conversation.tools or any(
                message.role == TOOL or message.calls or "<tool_call>" in message.content
                for message in conversation.messages)):
            conversation = conversation._replace(notes=(*conversation.notes, UNNAMED_MARKERS))
        if not self.renderer.thinks:
            return list(conversation.notes)
        answers = [divided(message) for message in conversation.messages if message.role == BOT and message.train]
        return ([note for note in conversation.notes if note != NO_REASONING] + [ALONE for _ in answers[1:]]
                + [UNREASONED for message in answers if not message.reasoning])


def _count(counts: Counter[str], result: Cut, tokens: int) -> str:
    """Count what became of a conversation or document; returns the counter's name."""
    counts["conversations"] += 1
    counts["tokens"] += tokens
    counts["tokens kept"] += result.kept
    counts["tokens dropped"] += result.dropped
    counts["tokens repeated"] += result.repeated
    counts["pieces"] += len(result.pieces)
    fate = result.fate if result.pieces else f"dropped: {result.fate}"
    counts[fate] += 1
    return fate


def source_formats(sources: Sequence[Source], named: Optional[str] = None) -> List[str]:
    """The data format of each source: `named`, or that of its first usable record. Raises ConfigError."""
    if named:
        return [named] * len(sources)
    return [TEXT if is_text(source.path) else _detect(source) for source in sources]


def _detect(source: Source) -> str:
    first: Optional[bytes] = None
    fault: Optional[str] = None
    for raw in peek_records(source):
        try:
            found = detect_format(raw)
        except RecordError as err:
            fault = fault or str(err)
            found = None
        if found:
            return found
        first = first or raw
    if first is None:
        return "input_output"                    # an empty file: any format reads nothing from it
    start = first[:60].decode("utf-8", "replace").strip()
    if fault:
        raise ConfigError(f"input file {source.path} contains no readable record: the first ({start!r}...) is "
                          f"{fault}; expected JSON, CSV with column names, or Parquet")
    raise ConfigError(f"cannot tell the format of {source.path} from its first records ({start!r}...); set it "
                      "with --format")
