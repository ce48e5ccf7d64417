"""What --perplexity scores: everything that preprocessing reads, conversations by their answers. No MindSpore here.

A text is scored on every token, in windows; a conversation on what training counts: each answer and its end marker,
given everything before it.
"""
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple, Union

from research.telechat.common.errors import ConfigError, ConversationError, RecordError
from research.telechat.data.documents import Document
from research.telechat.data.encoding import source_formats
from research.telechat.data.records import Conversation, parse_any
from research.telechat.data.sources import find_sources, read_chunks
from research.telechat.evaluation.batches import Scored, fit, rolling_windows
from research.telechat.text.renderer import Renderer


class Record(NamedTuple):
    """A text or a conversation, and its location."""

    content: Union[Document, Conversation]
    file: Path
    number: int                      # of the line or row


class Parts(NamedTuple):
    """The model's input, and how much text that is."""

    windows: List[Scored]
    texts: int                       # records
    answers: int                     # of conversations
    characters: int
    bytes: int                       # in UTF-8
    unscored: int                    # tokens at the beginning of answers that are longer than the context


def read_records(name: str) -> List[Record]:
    """The records of a file, a folder, or a .json list of files, each once. Raises ConfigError."""
    try:
        sources = [source._replace(weight=1.0) for source in find_sources([name])]
        formats = source_formats(sources)
    except ConfigError as err:
        raise ConfigError(f"--perplexity: {err}") from err
    records = []
    for chunk in read_chunks(sources):
        file = sources[chunk.source].path
        for number, raw in zip(chunk.numbers, chunk.records):
            try:
                records.append(Record(parse_any(raw, formats[chunk.source], named=False), file, number))
            except RecordError as err:
                if err.kind != "empty text":
                    raise ConfigError(f"--perplexity: {file}, record {number}: {err}") from err
    if not records:
        raise ConfigError(f"--perplexity: {name} contains no text")
    return records


def parts_of(records: Sequence[Record], renderer: Renderer, prefix: int, limit: int) -> Parts:
    """The windows of all records.

    Args:
        records: of `read_records`.
        renderer: writes conversations as in training.
        prefix: the token before a text.
        limit: tokens of the longest input.

    Raises:
        ConfigError: a conversation that the model's family cannot represent.
    """
    vocab, windows = renderer.vocab, []
    texts: List[str] = []
    answers = unscored = 0
    for record in records:
        if isinstance(record.content, Document):
            windows += rolling_windows(vocab.encode(record.content.text), prefix, limit)
            texts.append(record.content.text)
            continue
        try:
            rendered = [renderer.render(part, record.content.tools)
                        for part in renderer.conversations(record.content.messages)]
        except ConversationError as err:
            raise ConfigError(f"--perplexity: {record.file}, record {record.number}: {err}") from err
        for ids, mask in rendered:
            for start, end in spans(mask):
                fitted = fit(ids[:start] or [prefix], ids[start:end], limit)
                windows.append(fitted.scored)
                unscored += fitted.lost_target
                answers += 1
                texts.append(vocab.decode(ids[start:end], True))
    size = sum(len(text.encode()) for text in texts)
    return Parts(windows, len(records), answers, sum(map(len, texts)), size, unscored)


def spans(mask: Sequence[int]) -> List[Tuple[int, int]]:
    """(start, end) of each run of ones."""
    edges = [0, *mask, 0]
    changes = [place for place in range(len(mask) + 1) if edges[place] != edges[place + 1]]
    return list(zip(changes[::2], changes[1::2]))
