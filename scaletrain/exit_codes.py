"""What a process tells its launcher by how it ends; docs/reference/run-folder.md has this table.

0    done 1    a defect of this program, with its traceback 2    invalid input: the same command
would be refused again 75   a failure that may pass (EX_TEMPFAIL of sysexits.h): storage, network,
memory, a process that died; start again 128+n  ended by signal n, after saving where that signal
asks for it
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

DEFECT, INVALID, RETRY = 1, 2, 75

# the variable by which a launcher says where the first rank that fails leaves its code
ERROR_FILE = "SCALETRAIN_ERROR_FILE"

# Storage, network and memory come back, so these say nothing about the command. A full disk is one
# of them: it is usually another job's doing, and the launchers bound how often they start again.
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
    """Whether another start may succeed: the error, or what it was raised from, is of storage,
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
    """The exit code of an expected error."""
    return RETRY if passing(error) else int(getattr(error, "exit_code", INVALID))


def claim(code: int) -> int | None:
    """None for the first rank of a start that fails: it reports. The others, mostly its victims,
    get its exit code.
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
    except OSError:  # the launch folder is gone or full: better two reports than none
        return None
