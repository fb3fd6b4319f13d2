"""Masks in MATLAB files of version 5 to 7.

Source: MathWorks, MAT-File Format. They are read here and not by scipy, which is no dependency, and
whose reader can end the process on a damaged file and takes whatever memory that asks for.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seg_torch.errors import InputError

# The types of an element's numbers, as NumPy calls them.
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
TYPES |= {13: "u8"}
COMPRESSED = 15
LIMIT = 1 << 28  # bytes that a compressed variable may unpack to


def read_mat_mask(path: Path, key: str, field: str | None = None) -> np.ndarray:
    """Return a matrix of ids in a MATLAB file.

    Args:
        path: The file.
        key: Name of the variable.
        field: Where the variable is a structure, the field that is the matrix.

    Returns:
        uint8 [H, W].

    Raises:
        InputError: The file is missing, cut off or of another version, or holds no such matrix.
    """
    try:
        content = path.read_bytes()
        order = {b"IM": "<", b"MI": ">"}[content[126:128]]
        variables = _variables(content[128:], order)
        parts = next(parts for parts in variables if parts[2][1] == key.encode())
        if field is not None:
            (length,), names = struct.unpack(f"{order}i", parts[3][1]), parts[4][1]
            fields = [names[i : i + length].rstrip(b"\0") for i in range(0, len(names), length)]
            parts = _parts(parts[5 + fields.index(field.encode())][1], order)
        shape = np.frombuffer(parts[1][1], f"{order}i4")
        kind, values = parts[3]
        matrix = np.frombuffer(values, order + TYPES[kind]).reshape(shape, order="F")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except StopIteration:
        raise InputError(f"{path}: holds no variable {key!r}") from None
    except Exception as error:  # whatever the parser stumbles over
        raise InputError(f"{path}: cannot be read as a MATLAB file: {error!r}") from None
    with np.errstate(invalid="ignore"):  # of NaN, which differs from every id
        ids = matrix.astype(np.uint8, order="C")
    if ids.ndim != 2 or not np.array_equal(ids, matrix):
        raise InputError(f"{path}: {key} is no matrix of class ids, which are 0 to 255")
    return ids


def _variables(content: bytes, order: str) -> Iterator[list[tuple[int, bytes]]]:
    """Yield the parts of all variables: flags, shape, name and what the kind of it asks for."""
    for kind, data in _parts(content, order):
        if kind != COMPRESSED:
            yield _parts(data, order)
            continue
        unpacker = zlib.decompressobj()
        unpacked = unpacker.decompress(data, LIMIT)
        if unpacker.unconsumed_tail:
            raise ValueError(f"it would unpack to more than {LIMIT:,} bytes")
        yield from (_parts(part, order) for _, part in _parts(unpacked, order))


def _parts(content: bytes, order: str) -> list[tuple[int, bytes]]:
    """Return type and content of all elements that lie one behind the other."""
    parts, offset = [], 0
    while offset + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, offset)
        start, offset = offset + 8, offset + 8 + size
        if kind > 0xFFFF:  # up to four bytes lie in the tag itself
            kind, size, start, offset = kind & 0xFFFF, kind >> 16, start - 4, start
        elif kind != COMPRESSED:  # filled up to a multiple of eight bytes
            offset = start + -(-size // 8) * 8
        if start + size > len(content):
            raise ValueError("an element reaches beyond the end")
        parts.append((kind, content[start : start + size]))
    return parts
