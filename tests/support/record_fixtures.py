"""Conversations as records, and how they are read: what test_meaning, test_tools_in_records and
test_loss_markers share."""
import json

import pytest

from research.telechat.common.errors import RecordError
from research.telechat.data.records import parse_record

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def parsed(record, data_format="messages", named=False):
    """The conversation of a record."""
    return parse_record(json.dumps(record).encode(), data_format, named)


def refused(record, data_format="messages"):
    """Why a record is unusable."""
    with pytest.raises(RecordError) as caught:
        parsed(record, data_format)
    assert "\n" not in str(caught.value)
    return caught.value.kind
