"""Texts that hypothesis makes up for tokenizers."""
from hypothesis import strategies as st

MARKERS = ["<_user>", "<_bot>", "<_end>", "<_start>"]                    # in all three
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
PIECES = st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(
    [*MARKERS, "<", ">", "_", "_user", "<_", "<<_user>>", "<_use", " ", "  ", "\n", "1", "生抽", "the ", " dog", "😀",
     "\x00", "<reserve1>", "<reserve10>", "<unk>", "<0x41>", "<pad>", "👍🏽"]))
TEXTS = st.lists(PIECES, max_size=12).map("".join)
