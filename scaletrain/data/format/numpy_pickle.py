"""Reads the pickles of arrays that some data sets and networks are published as, without Python's
unpickler: nothing in them is called.

`pickletools.genops` only splits the file into opcodes. Of these a closed list is interpreted here,
which can build numbers, strings, lists, tuples, dicts and numpy arrays, and no other object: the
names of constructors are compared with the few below and stay strings. A restricted
`pickle.Unpickler` would be shorter, but it does call what `find_class` returns, and numpy's real
constructors trust their arguments.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.errors import DataError
from scaletrain.runtime import local_files

# of a file; CIFAR-100's largest has 155 MB
MAX_BYTES = 1 << 29
_MARK = object()
# what the constructors below make
_ARRAY, _DTYPE, _BYTES = "an array", "a type", "bytes"
# of a caller's further names: a dict, an array that jax wrapped
MAPPING, JAX_ARRAY = "a mapping", "an array of jax"
_KNOWN = {
    # numpy 1, thus the published files
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    # only ever an argument of _reconstruct
    "numpy ndarray": "",
    "numpy dtype": _DTYPE,
    # how Python 3 writes bytes for protocol 2
    "_codecs encode": _BYTES,
    "__builtin__ bytes": _BYTES,
}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *(
        "BININT",
        "BININT1",
        "BININT2",
        "SHORT_BINSTRING",
        "BINSTRING",
        "BINUNICODE",
        "SHORT_BINUNICODE",
    ),
    *("SHORT_BINBYTES", "BINBYTES", "BINFLOAT", "LONG1"),
}


class _Name(str):
    """A global that the pickle names."""


class _Made:
    """What REDUCE makes of a name and its arguments, and BUILD completes."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments, self.state = kind, arguments, ()


class Record:
    """An object of a class that the caller passes over or takes apart: only what it was made of."""

    def __init__(self, name: str, arguments: Any) -> None:
        self.name, self.arguments, self.state = name, arguments, None


def load(
    path: Path,
    *,
    limit: int = MAX_BYTES,
    known: Mapping[str, str] | None = None,
    records: str = r"(?!)",
) -> dict[str, Any]:
    """The dict that a pickle of protocol 2 to 4 holds. Raises DataError for anything that it need
    not hold.

    limit: bytes of the file. known: further names, "module name", that make a MAPPING or a
    JAX_ARRAY. records: pattern of names whose objects become a Record.
    """
    try:
        machine = _Machine({**_KNOWN, **(known or {})}, re.compile(records))
        result = machine.run(local_files.read(path, limit))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a sound pickle ({error}); fetch it again") from None

    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise DataError(f"{path} holds no table of named columns")

    return result


def array(value: Any, path: Path) -> NDArray[np.uint8]:
    """An array of a loaded dict. Raises DataError if it is none, or not of bytes that match its
    shape.
    """
    return _array(value, path, "u1", "|", "bytes")


def floats(value: Any, path: Path) -> NDArray[np.float32]:
    """As `array`, of 32-bit floats."""
    return _array(value, path, "f4", "<", "32-bit floats")


def _array(value: Any, path: Path, kind: str, order: str, what: str) -> NDArray[Any]:
    try:
        version, shape, dtype, fortran, raw = value.state
        # Python 2 wrote byte strings
        data = raw.encode("latin-1") if isinstance(raw, str) else raw
        layout = version, dtype.arguments[0], dtype.state[1]
        if value.kind == _ARRAY and layout == (1, kind, order) and not (fortran and kind == "u1"):
            flat: NDArray[Any] = np.frombuffer(data, f"{order}{kind}")
            return flat.reshape(tuple(shape), order="F" if fortran else "C")
    except (AttributeError, TypeError, ValueError, LookupError, UnicodeEncodeError):
        pass

    raise DataError(f"{path}: no array of {what} where one should be")


class _Machine:
    """The stack machine of pickle, reduced to data."""

    def __init__(self, known: Mapping[str, str], records: re.Pattern[str]) -> None:
        self.known, self.records = known, records
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for code, value, _ in pickletools.genops(data):
            if code.name == "STOP":
                return self.stack.pop()
            self._step(code.name, value)
        raise DataError("the pickle has no end")

    def _step(self, code: str, value: Any) -> None:
        stack = self.stack
        if code in _LITERALS:
            stack.append(value)
        elif code in _VALUES:
            stack.append(_VALUES[code])
        elif code in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if value is None else value] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif code == "MARK":
            stack.append(_MARK)
        elif code in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if code == "EMPTY_LIST" else {})
        elif code in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._fill(code)
        elif code in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._marked() if code == "TUPLE" else self._last(int(code[-1]))))
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            self._name(" ".join(self._last(2)) if value is None else value)
        elif code in ("REDUCE", "NEWOBJ"):
            name, arguments = self._last(2)
            if not isinstance(name, _Name) or not (self.known.get(name) or self._is_record(name)):
                raise DataError(
                    "the pickle would call something that is no constructor of arrays, which is "
                    "refused"
                )

            stack.append(self._made(name, arguments, code))
        elif code == "BUILD":
            made, state = self._last(2)
            if not ((isinstance(made, _Made) and isinstance(state, tuple)) or type(made) is Record):
                raise DataError(
                    "the pickle would set the state of something that is no array, which is refused"
                )

            made.state = state
            stack.append(made)
        elif code not in ("PROTO", "FRAME"):
            raise DataError(
                f"the pickle has the instruction {code}, which no array needs and which is refused"
            )

    def _is_record(self, name: str) -> bool:
        return name not in self.known and self.records.fullmatch(name) is not None

    def _made(self, name: _Name, arguments: Any, code: str) -> Any:
        """What a name makes of its arguments."""
        kind = self.known.get(name)
        if kind is None:
            return Record(str(name), arguments)
        if kind == MAPPING:
            return dict(*arguments)
        if code == "REDUCE" and kind == JAX_ARRAY:
            made = _Made(_ARRAY, arguments[1])
            made.state = arguments[2]
            return made
        if code == "REDUCE" and kind in (_ARRAY, _DTYPE):
            return _Made(kind, arguments)
        if code == "REDUCE" and kind == _BYTES and arguments in ((), (arguments[0], "latin1")):
            return arguments[0].encode("latin-1") if arguments else b""

        raise DataError(f"the pickle uses '{name}' in a way that no array needs: refused")

    def _name(self, name: str) -> None:
        if name not in self.known and not self._is_record(name):
            raise DataError(
                f"the pickle names '{name}', which is no part of an array: refused, nothing was run"
            )
        self.stack.append(_Name(name))

    def _fill(self, code: str) -> None:
        items = self._marked() if code.endswith("S") else self._last(1 if code == "APPEND" else 2)
        into = self.stack[-1]
        if code.startswith("APPEND") and isinstance(into, list):
            into.extend(items)
        elif code.startswith("SETITEM") and isinstance(into, dict):
            into.update(zip(items[::2], items[1::2], strict=True))
        else:
            raise DataError(f"the pickle has the instruction {code} in a wrong place")

    def _marked(self) -> list[Any]:
        """Pop what is above the last mark, and the mark."""
        at = next((i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _MARK), -1)
        if at < 0:
            raise DataError("the pickle takes more than it has")

        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise DataError("the pickle takes more than it has")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items
