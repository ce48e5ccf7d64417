"""The wire format of protobuf messages, for formats that are read without generated classes.

Source: the protobuf encoding documentation. `data` is `bytes`, or a `FileBytes`, which reads no more of a file than
what is looked at.
"""
from typing import BinaryIO, Iterator, Protocol, Tuple, Union, overload

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5             # wire types
_LONGEST = 70                                            # bits of a varint of ten bytes


class Data(Protocol):
    """Bytes by index."""

    @overload
    def __getitem__(self, where: int, /) -> int: ...

    @overload
    def __getitem__(self, where: slice, /) -> bytes: ...


class FileBytes:
    """The bytes of an open file by index; IndexError behind its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @overload
    def __getitem__(self, where: int, /) -> int: ...

    @overload
    def __getitem__(self, where: slice, /) -> bytes: ...

    def __getitem__(self, where: Union[int, slice]) -> Union[int, bytes]:
        start, count = (where, 1) if isinstance(where, int) else (where.start, where.stop - where.start)
        self._file.seek(start)
        content = self._file.read(count)
        if len(content) < count:
            raise IndexError(f"the file ends before byte {start + count}")
        return content[0] if isinstance(where, int) else content


def fields(data: Data, position: int, end: int) -> Iterator[Tuple[int, int, int, int]]:
    """(field number, wire type, start, end) of each field of the message data[position:end].

    Raises:
        ValueError, IndexError: it is not a message. The message names the byte at which the field begins.
    """
    while position < end:
        field = position
        tag, position = varint(data, position)
        wire = tag & 7
        if wire == BYTES:
            length, position = varint(data, position)
        elif wire == VARINT:
            length = varint(data, position)[1] - position
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type at byte {field}")
        if position + length > end:
            raise IndexError(f"the field at byte {field} reaches past the end")
        yield tag >> 3, wire, position, position + length
        position += length


def varint(data: Data, position: int) -> Tuple[int, int]:
    """(value, position behind it). Raises IndexError, ValueError."""
    value = shift = 0
    while shift < _LONGEST:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"a number of more than ten bytes ends at byte {position}")
