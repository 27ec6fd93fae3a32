"""Loader workers: forked processes that make batches in shared memory, watched by the main process.

Each worker has two pipes of its own, one for its tasks and one for the batches that it announces,
and shares no lock or queue with other workers. So a worker that is killed or stopped blocks no
other, and the main process, which checks on all workers while it waits, reports which one failed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from time import monotonic, sleep
from typing import NamedTuple, NoReturn

import cv2
import torch

from scaletrain.data.errors import DataError, LoaderError
from scaletrain.data.loading import watchdog
from scaletrain.data.loading.dataset import BatchDataset, Failure, RawBatch, Sampler
from scaletrain.data.loading.slot import Slot, Slots, size_of
from scaletrain.data.loading.to_device import Pinned
from scaletrain.data.loading.watchdog import Watchdog
from scaletrain.runtime import heartbeat

# seconds to wait for killed workers to end: one blocked in a call to dead storage does not
PATIENCE = 5.0
# signals that only the main process handles
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)

_LIBC = ctypes.CDLL(None)
# a task: position in the sampler, number of the slot
_TASK = struct.Struct("=qq")
# the length of the message that follows
_LENGTH = struct.Struct("=q")
# bytes: the capacity of a pipe
_CHUNK = 1 << 16


class Defect(NamedTuple):
    """Sent in place of a batch: the traceback of an exception that the data did not cause."""

    text: str


class WorkerPool:
    """`workers` processes that make the items of `dataset` that `sampler` lists, returned in its
    order.

    Each worker has up to `prefetch` batches in progress or ready. name(sample) returns where a
    sample is stored. Raises LoaderError where memory or processes cannot be allocated.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        sampler: Sampler,
        name: Callable[[int], str],
        device: torch.device,
        *,
        workers: int,
        prefetch: int,
        timeout: float,
        liveness: float,
    ) -> None:
        self._dataset, self._sampler, self._owner = dataset, sampler, os.getpid()
        self._workers: list[WorkerProcess] = []
        self._pinned = Pinned(device)
        ahead = min(workers * prefetch, len(sampler))
        # one more batch is in use, and on a GPU the previous one may still be being copied
        slots = min(ahead + (2 if device.type == "cuda" else 1), len(sampler))
        largest = dataset.largest(sampler)
        size = size_of(dataset.blank(largest, partial(torch.empty, device="meta")))

        try:
            self._slots, self._signs = Slots(slots, size), heartbeat.shared(workers)
            for number in range(workers):
                self._workers.append(WorkerProcess(partial(self._serve, number)))
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError | OverflowError):
                raise

            raise LoaderError(
                f"{workers} loader workers with {slots} batches of {size:,} bytes cannot be "
                "started: "
                f"{getattr(error, 'strerror', None) or error}; lower data.workers, data.prefetch "
                "or batch"
            ) from None

        self._watchdog = Watchdog(
            self._workers, self._signs, name, timeout=timeout, liveness=liveness
        )

        # numbers of slots: the free ones, each with the end of the last copy from it, and those of
        # the batches in progress or ready, in order
        self._free = deque[tuple[int, torch.cuda.Event | None]](
            (number, None) for number in range(slots)
        )
        self._ahead = deque[int]()
        self._given, self._taken = 0, 0

        for _ in range(ahead):
            self._give()

    def take(self) -> RawBatch | Failure:
        """The next batch, whose tensors are valid until `release`. Raises LoaderError, or
        RuntimeError for a defect in the worker.
        """
        self._watchdog.alive()
        worker = self._workers[self._taken % len(self._workers)]
        message = worker.receive() or self._wait(worker)
        number = self._ahead.popleft()
        self._taken, self._used = self._taken + 1, number
        slot = self._slots[number]

        item = slot.unpack(message)
        if isinstance(item, Defect):
            raise RuntimeError(f"in loader worker {worker.pid}:\n{item.text}")

        self._pinned.add(slot.memory)
        self._give()
        return item  # type: ignore[no-any-return]

    def release(self) -> None:
        """Free the last batch: it has been copied, or a copy of it has been queued on the GPU."""
        self._free.append((self._used, self._pinned.event()))

    def close(self) -> None:
        """Kill the workers, which have nothing to clean up."""
        if os.getpid() != self._owner:
            # a copy of this object in another forked process
            return

        for worker in self._workers:
            worker.kill()

        end = monotonic() + PATIENCE
        while any(worker.ended() is None for worker in self._workers) and monotonic() < end:
            sleep(0.001)

        while self._workers:
            self._workers.pop().close()

        self._pinned.close()

    def _give(self) -> None:
        """Assign the next batch, if there is one, to the slot that has been free for longest."""
        if self._given == len(self._sampler):
            return

        number, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()

        self._workers[self._given % len(self._workers)].give(self._given, number)
        self._ahead.append(number)
        self._given += 1

    def _wait(self, worker: WorkerProcess) -> bytes:
        self._watchdog.begin()
        while True:
            begin = monotonic()
            wait([worker.messages], watchdog.CHECK)
            if message := worker.receive():
                return message

            # if the main process was stopped itself, that time does not count
            self._watchdog.look(
                self._taken % len(self._workers), min(monotonic() - begin, watchdog.CHECK)
            )

    def _serve(self, number: int, tasks: int, messages: int) -> None:
        """The main loop of a worker."""
        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        heartbeat.share(self._signs[number])

        while task := os.read(tasks, _TASK.size):
            place, slot = _TASK.unpack(task)
            data = self._made(place, self._slots[slot])
            rest = memoryview(_LENGTH.pack(len(data)) + data)
            while rest:
                rest = rest[os.write(messages, rest) :]

    def _made(self, place: int, slot: Slot) -> bytes:
        """Make a batch -> the message that announces it."""
        self._dataset.new = slot.new
        failure: Failure | Defect
        try:
            with heartbeat.watched():
                return slot.pack(self._dataset[self._sampler[place]])
        except (DataError, OSError) as error:
            failure = Failure(error)
        except MemoryError:
            text = (
                f"a loader worker (pid {os.getpid()}) ran out of memory; lower data.workers or "
                "data.prefetch"
            )
            failure = Failure(LoaderError(text))
        except Exception:
            failure = Defect(traceback.format_exc())

        return slot.pack(failure)


class WorkerProcess:
    """A forked process that runs serve(tasks, messages), the ends of two pipes, until it is killed.
    Raises OSError.
    """

    def __init__(self, serve: Callable[[int, int], None]) -> None:
        self._ended: str | None = None
        self._received = bytearray()
        tasks, self._tasks = os.pipe()
        self.messages, messages = os.pipe()
        os.set_blocking(self.messages, False)
        parent = os.getpid()
        # block the signals until the worker ignores them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)

        try:
            # Python 3.12 warns of a fork while other threads run
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                # not by multiprocessing, which at exit waits without limit for a process that
                # cannot end
                self.pid = os.fork()

            if not self.pid:
                _run_worker(parent, partial(serve, tasks, messages))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(tasks)
            os.close(messages)

    def give(self, place: int, slot: int) -> None:
        # the watchdog reports that this worker has ended, and how
        with suppress(BrokenPipeError):
            os.write(self._tasks, _TASK.pack(place, slot))

    def receive(self) -> bytes | None:
        """The next message, or None if it is not complete yet. Does not wait."""
        with suppress(BlockingIOError):
            while part := os.read(self.messages, _CHUNK):
                self._received += part

        if len(self._received) < _LENGTH.size:
            return None

        end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None

        message = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return message

    def ended(self) -> str | None:
        """How the process ended, and what may help; None while it runs."""
        if self._ended is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # where SIGCHLD is ignored, the exit status is lost
                self._ended = "has ended"
            else:
                self._ended = _how(os.waitstatus_to_exitcode(status)) if pid else None

        return self._ended

    def kill(self) -> None:
        if self.ended() is None:
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        os.close(self._tasks)
        os.close(self.messages)


def _run_worker(parent: int, serve: Callable[[], None]) -> NoReturn:
    """Run a worker. It never returns into the code of the main process, and ends when that process
    ends, for whatever reason.
    """
    try:
        if sys.platform == "linux":
            # PR_SET_PDEATHSIG
            _LIBC.prctl(1, signal.SIGKILL)

        if os.getppid() == parent:
            for number in IGNORED:
                signal.signal(number, signal.SIG_IGN)
            serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _how(code: int) -> str:
    memory = "if memory ran out, lower data.workers or data.prefetch"
    if code >= 0:
        return f"ended with exit code {code}; {memory}"
    if code == -signal.SIGBUS:
        return "was killed by SIGBUS; a file that it reads was cut short, or its storage failed"

    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}; {memory}"
