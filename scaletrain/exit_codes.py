"""Exit codes, by which a process tells its launcher how it ended. The README has the same table.

- 0: success
- 1: a defect of this program, with a traceback
- 2: invalid input; the same command would be refused again
- 75 (EX_TEMPFAIL of sysexits.h): a transient failure of storage, network, memory or another
  process; start again
- 128 + n: ended by signal n, after saving where that signal asks for it
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

DEFECT, INVALID, RETRY = 1, 2, 75

# Variable of the launcher: the file in which the first rank that fails leaves its exit code.
ERROR_FILE = "SCALETRAIN_ERROR_FILE"

# Transient failures of storage, network and memory. A full disk is one of them: it is often due to
# another job, and launchers limit how often they restart.
_PASSING = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EREMOTEIO,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.ENFILE,
        errno.ENOLCK,
        errno.ENOLINK,
        errno.EPIPE,
        errno.EPROTO,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
    }
)


def passing(error: BaseException | None) -> bool:
    """Whether another start may succeed: the error, or one of its causes, is a failure of storage,
    network or memory.
    """
    while error is not None:
        if (
            isinstance(error, MemoryError | TimeoutError | ConnectionError)
            or getattr(error, "exit_code", None) == RETRY
        ):
            return True
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True

        error = error.__cause__

    return False


def of(error: BaseException) -> int:
    """The exit code for an expected error."""
    return RETRY if passing(error) else int(getattr(error, "exit_code", INVALID))


def claim(code: int) -> int | None:
    """None for the first rank that fails, which then reports; the first rank's exit code for the
    others, which mostly fail because of it.
    """
    place = os.environ.get(ERROR_FILE)
    if not place:
        return None

    try:
        with Path(place).open("x") as file:
            file.write(str(code))
        return None
    except FileExistsError:
        return int(Path(place).read_text() or code)
    except OSError:
        # The launch folder is gone or full: two reports are better than none.
        return None
