"""IDX files, the format of MNIST and its successors."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.errors import DataError
from scaletrain.runtime import local_files

MAX_BYTES = 1 << 30


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The uint8 array of a gzipped IDX file (LeCun, "The MNIST database", file formats). Raises
    DataError.
    """
    try:
        with local_files.reader(path) as packed, gzip.open(packed) as file:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{path} is not an IDX file of {dimensions} dimensions of bytes")

            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = int(np.prod([int(n) for n in shape], dtype=object))
            if size > MAX_BYTES:
                raise DataError(f"{path} claims {size} bytes; at most {MAX_BYTES} are read")

            data = file.read(size + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None

    if len(data) != size:
        raise DataError(f"{path}: the content is not the {size} bytes that its head says")

    return np.frombuffer(data, np.uint8).reshape(shape)
