"""Passes over the data between steps, which a method may ask for at the start of an epoch and after
the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from weakref import WeakSet

from torch import Tensor

from scaletrain import dist
from scaletrain.core import Batch, Clock, Features
from scaletrain.data.loading.loader import Stream
from scaletrain.data.sampling.plan import EverySample
from scaletrain.engines.base import Engine
from scaletrain.runtime.signals import Interrupt, Stopped


class Passes:
    """The passes over the data that a method's hooks ask for."""

    def __init__(self, engine: Engine, open_stream: Callable[[bool], Stream]) -> None:
        """open_stream(every): the stream of every sample, or of those that an epoch draws; called
        when a pass first needs it.
        """
        self._engine, self._open = engine, open_stream
        self._streams: dict[bool, Stream] = {}

    @contextmanager
    def features(self, clock: Clock, interrupt: Interrupt, updates: int) -> Iterator[Features]:
        """A context with the `features` of a method's hook; its passes end with it.

        A pass may take longer than a scheduler waits after its signal, so it raises Stopped between
        two batches. updates: optimizer steps made so far, for the text.
        """

        def check() -> None:
            if number := interrupt.agreed():
                raise Stopped(number, updates, saved=False)

        # weakly, so that a pass ends as soon as the hook drops it
        running: WeakSet[Generator[tuple[Tensor, Tensor], None, None]] = WeakSet()

        def features(
            embed: Callable[[Batch], Tensor], *, every: bool = True, training: bool = False
        ) -> Iterator[tuple[Tensor, Tensor]]:
            found = self._run(embed, clock.epoch, check, every=every, training=training)
            running.add(found)
            return found

        try:
            yield features
        finally:
            for found in list(running):
                found.close()

    def _run(
        self,
        embed: Callable[[Batch], Tensor],
        epoch: int,
        check: Callable[[], None],
        *,
        every: bool,
        training: bool,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        if every not in self._streams:
            self._streams[every] = self._open(every)

        stream = self._streams[every]
        plan, first = stream.plan, epoch * stream.steps_per_epoch
        lo, hi = plan.part(dist.rank(), dist.world())

        # the workers end with the pass, however it ends
        with closing(stream.batches(first, first + stream.steps_per_epoch)) as batches:
            found = self._engine.features(batches, embed, training=training)
            for step, (index, out) in enumerate(found):
                check()
                filling = plan.filling(step, lo, hi) if isinstance(plan, EverySample) else 0
                yield index[: len(index) - filling], out[: len(out) - filling]

    def close(self) -> None:
        """Stop the workers of every pass that is still open."""
        for stream in self._streams.values():
            stream.close()
