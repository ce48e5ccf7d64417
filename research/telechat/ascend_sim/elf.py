"""Shared objects of 64-bit Linux, as much of them as stub libraries need. Standard library only.

`SharedObject` reads what a library needs and offers; `write_library` makes one whose functions are a few machine
instructions each. x86_64 and aarch64. Format: System V ABI, chapters 4 and 5.
"""
import mmap
import struct
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Set

X86_64, AARCH64 = 62, 183                          # e_machine
_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_VERSYM = 6, 11, 0x6FFFFFFF
_DT_NEEDED, _DT_RPATH, _DT_RUNPATH = 1, 15, 29
_GLOBAL_VERSION = 1                               # higher numbers name a version of the library that defines it


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class SharedObject:
    """What the dynamic linker would read from a library.

    Attributes: machine; needed, names of other libraries; search, folders given by the library for them; defined and
    undefined, names of symbols (undefined without weak ones and without those that must come from a versioned library
    such as libc, which is never CANN).

    Raises ValueError where the file is no 64-bit little-endian ELF file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.needed: List[str] = []
        self.search: List[Path] = []
        self.defined: Set[str] = set()
        self.undefined: Set[str] = set()
        with path.open("rb") as handle:
            head = handle.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
            self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self.machine, = struct.unpack_from("<H", head, 18)
        table, = struct.unpack_from("<Q", head, 40)
        size, count, self._names = struct.unpack_from("<HHH", head, 58)
        self._sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", self._bytes, table + size * i))
                          for i in range(count)]
        for section in self._sections:
            if section.kind == _SHT_DYNAMIC:
                self._read_dynamic(section)
            elif section.kind == _SHT_DYNSYM:
                self._read_symbols(section)

    def _text(self, offset: int) -> str:
        return self._bytes[offset:self._bytes.find(b"\0", offset)].decode("utf-8", "replace")

    def _read_dynamic(self, section: _Section) -> None:
        strings = self._sections[section.link].offset
        data = self._bytes[section.offset:section.offset + section.size]
        for tag, value in struct.iter_unpack("<qQ", data):
            if tag == _DT_NEEDED:
                self.needed.append(self._text(strings + value))
            elif tag in (_DT_RPATH, _DT_RUNPATH):
                here = str(self.path.resolve().parent)
                folders = self._text(strings + value).replace("${ORIGIN}", here).replace("$ORIGIN", here)
                self.search += [Path(folder) for folder in folders.split(":") if folder]
            elif tag == 0:
                break

    def _read_symbols(self, section: _Section) -> None:
        strings = self._sections[section.link].offset
        versions = next((other.offset for other in self._sections if other.kind == _SHT_VERSYM), None)
        data = self._bytes[section.offset:section.offset + section.size]
        for index, (name, info, _, where, _, _) in enumerate(struct.iter_unpack("<IBBHQQ", data)):
            if not name:
                continue
            if where:
                self.defined.add(self._text(strings + name))
                continue
            weak = info >> 4 == 2
            version = struct.unpack_from("<H", self._bytes, versions + 2 * index)[0] & 0x7FFF if versions else 0
            if not weak and version <= _GLOBAL_VERSION:
                self.undefined.add(self._text(strings + name))

    def constants(self) -> Iterator[bytes]:
        """The texts in the read-only data."""
        names = self._sections[self._names].offset
        for section in self._sections:
            if section.kind == 1 and self._text(names + section.name).startswith(".rodata"):
                yield from self._bytes[section.offset:section.offset + section.size].split(b"\0")


class Code:
    """Machine code of the three functions that a stub may be. Raises ValueError for an unknown processor."""

    def __init__(self, machine: int):
        if machine not in (X86_64, AARCH64):
            raise ValueError(f"processor {machine} of the ELF format is unknown; x86_64 and aarch64 are supported")
        self.x86 = machine == X86_64

    def zero(self) -> bytes:
        """long f(...) { return 0; }"""
        # xor eax, eax; xor edx, edx; ret       |  mov x0, 0; mov x1, 0; ret
        return bytes.fromhex("31c031d2c3") if self.x86 else struct.pack("<3I", 0xD2800000, 0xD2800001, 0xD65F03C0)

    def answer(self, value: int) -> bytes:
        """int f(unsigned *out) { *out = value; return 0; } with a value below 65536"""
        if self.x86:                          # mov dword [rdi], value; xor eax, eax; ret
            return b"\xc7\x07" + struct.pack("<I", value) + b"\x31\xc0\xc3"
        # mov w1, value; str w1, [x0]; mov w0, 0; ret
        return struct.pack("<4I", 0x52800001 | value << 5, 0xB9000001, 0x52800000, 0xD65F03C0)

    def text(self, value: str) -> bytes:
        """const char *f() { return value; }"""
        # lea rax, [rip + 1]; ret; value        |  adr x0, . + 8; ret; value
        code = bytes.fromhex("488d0501000000c3") if self.x86 else struct.pack("<2I", 0x10000040, 0xD65F03C0)
        return code + value.encode() + b"\0"


def _hash(name: bytes) -> int:
    """The hash of symbol names (System V ABI, figure 5-13)."""
    value = 0
    for byte in name:
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high & 0xFFFFFFFF
    return value


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


class _Strings:
    """A string table that holds each text once."""

    def __init__(self) -> None:
        self.data = bytearray(b"\0")
        self._at: Dict[str, int] = {}

    def add(self, text: str) -> int:
        if text not in self._at:
            self._at[text] = len(self.data)
            self.data += text.encode() + b"\0"
        return self._at[text]


def write_library(soname: str, symbols: Dict[str, Optional[bytes]], machine: int, needed: Sequence[str] = ()) -> bytes:
    """The content of a shared object called `soname`.

    symbols: name -> machine code; None makes it data, 4096 zero bytes that all such symbols share (vtables and type
    infos that are only compared or copied). needed: libraries that it asks for.

    Two segments: headers, symbols and code to read and execute; the dynamic section and the zeros to write.
    """
    page, zeros = 0x10000, 4096                     # the largest page of either processor
    strings = _Strings()
    names = sorted(symbols)
    name_at = [strings.add(name) for name in names]
    dynamic = [(_DT_NEEDED, strings.add(library)) for library in needed] + [(14, strings.add(soname))]

    count = len(names) + 1                          # symbol 0 is none
    buckets = max(1, count // 2)
    hash_at = 64 + 4 * 56
    symbols_at = _up(hash_at + 4 * (2 + buckets + count), 8)
    strings_at = symbols_at + 24 * count
    code_at = _up(strings_at + len(strings.data), 16)
    code = bytearray()
    code_of = {}
    for name in names:
        content = symbols[name]
        if content is not None:
            code += bytes(-len(code) % 16)
            code_of[name] = code_at + len(code)
            code += content
    dynamic_at = _up(code_at + len(code), page)
    dynamic += [(4, hash_at), (5, strings_at), (6, symbols_at), (10, len(strings.data)), (11, 24), (0, 0)]
    zeros_at = dynamic_at + 16 * len(dynamic)

    first, follows = [0] * buckets, [0] * count
    table = bytearray(24)
    for index, (name, at) in enumerate(zip(names, name_at), 1):
        content = symbols[name]
        size = zeros if content is None else len(content)
        table += struct.pack("<IBBHQQ", at, 0x11 if content is None else 0x12, 0, 1, code_of.get(name, zeros_at), size)
        slot = _hash(name.encode()) % buckets
        follows[index], first[slot] = first[slot], index

    writable = 16 * len(dynamic) + zeros
    segments = ((1, 5, 0, code_at + len(code), page), (1, 6, dynamic_at, writable, page),
                (2, 6, dynamic_at, 16 * len(dynamic), 8), (0x6474E551, 6, 0, 0, 16))
    image = bytearray(dynamic_at + writable)

    def put(at: int, data: bytes) -> None:
        image[at:at + len(data)] = data

    put(0, b"\x7fELF\x02\x01\x01" + bytes(9))
    put(16, struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0))
    for index, (kind, flags, at, size, align) in enumerate(segments):
        put(64 + 56 * index, struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align))
    put(hash_at, struct.pack(f"<{2 + buckets + count}I", buckets, count, *first, *follows))
    put(symbols_at, bytes(table))
    put(strings_at, bytes(strings.data))
    put(code_at, bytes(code))
    for index, entry in enumerate(dynamic):
        put(dynamic_at + 16 * index, struct.pack("<qQ", *entry))
    return bytes(image)
