"""Reads the pickles of arrays that some data sets are published as, without Python's unpickler:
nothing in them is called.

`pickletools.genops` only splits the file into opcodes. Of these a closed list is interpreted here,
which can build numbers, strings, lists, tuples, dicts and one-byte numpy arrays, and no other
object: the names of numpy's constructors are compared with the few below and stay strings. A
restricted `pickle.Unpickler` would be shorter, but it does call what `find_class` returns, and
numpy's real constructors trust their arguments.
"""

from __future__ import annotations

import pickletools
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
_ARRAY, _DTYPE = "an array", "a type"
_KNOWN = {
    # numpy 1, thus the published files
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    # only ever an argument of _reconstruct
    "numpy ndarray": "",
    "numpy dtype": _DTYPE,
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
    *("SHORT_BINBYTES", "BINBYTES"),
}


class _Name(str):
    """A global that the pickle names."""


class _Made:
    """What REDUCE makes of a name and its arguments, and BUILD completes."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments, self.state = kind, arguments, ()


def load(path: Path) -> dict[str, Any]:
    """The dict that a pickle of protocol 2 to 4 holds. Raises DataError for anything that it need
    not hold.
    """
    try:
        result = _Machine().run(local_files.read(path, MAX_BYTES))
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
    try:
        version, shape, kind, fortran, raw = value.state
        name, order = kind.arguments[0], kind.state[1]
        # Python 2 wrote byte strings
        data = raw.encode("latin-1") if isinstance(raw, str) else raw
        if value.kind == _ARRAY and (version, name, order, fortran) == (1, "u1", "|", False):
            return np.frombuffer(data, np.uint8).reshape(shape)
    except (AttributeError, TypeError, ValueError, LookupError, UnicodeEncodeError):
        pass

    raise DataError(f"{path}: no array of bytes where one should be")


class _Machine:
    """The stack machine of pickle, reduced to data."""

    def __init__(self) -> None:
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
        elif code == "REDUCE":
            name, arguments = self._last(2)
            if not isinstance(name, _Name) or not _KNOWN[name]:
                raise DataError(
                    "the pickle would call something that is no constructor of arrays, which is "
                    "refused"
                )

            stack.append(_Made(_KNOWN[name], arguments))
        elif code == "BUILD":
            made, state = self._last(2)
            if not isinstance(made, _Made) or not isinstance(state, tuple):
                raise DataError(
                    "the pickle would set the state of something that is no array, which is refused"
                )

            made.state = state
            stack.append(made)
        elif code not in ("PROTO", "FRAME"):
            raise DataError(
                f"the pickle has the instruction {code}, which no array needs and which is refused"
            )

    def _name(self, name: str) -> None:
        if name not in _KNOWN:
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
