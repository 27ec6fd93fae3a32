"""The online probe: a linear classifier that learns on the features of the online network while
that is trained, as that of BYOL's authors does (Grill et al., 2020, their code).

Its input has no gradient, it draws no random numbers, and its weights lie outside the method and
the engine, so training is the same to the last bit with and without it.

differs: the authors train it with the method's LARS and learning rate. Here it has Adam at a
constant rate, which fits any method and recipe, starts at zero, and sees a sample's first view.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist
from scaletrain.config.recipe import ConfigError
from scaletrain.core import Batch, Piece, StepResult
from scaletrain.data.loading.dataset import SYNTHETIC_CLASSES
from scaletrain.data.loading.loader import Stream
from scaletrain.engines.placement import PROBE, SavedTensors, Shard, pieces, replica
from scaletrain.train import run_folder

# Adam, with its usual constants
RATE, BETAS, EPSILON = 1e-3, (0.9, 0.999), 1e-8


class OnlineProbe:
    """Linear classifier of features [B, features] with the same weights on every rank, and its
    optimizer.
    """

    def __init__(self, features: int, classes: int, device: torch.device) -> None:
        # the last column is the bias
        shape = (classes, features + 1)
        self.weights, self.mean, self.square = (torch.zeros(shape, device=device) for _ in range(3))
        # of the optimizer
        self.steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, result: StepResult, batch: Batch) -> dict[str, Tensor]:
        """Learn from this rank's samples of a training step, and from those of all other ranks;
        every rank calls it.

        Returns probe/loss, the cross entropy, and probe/top1, the accuracy in per cent, of the
        global batch before learning from it; NaN where no sample has a label. With gradient
        accumulation the samples are those of the last micro-batch. A step that was skipped changes
        nothing.
        """
        h = result.embedding
        if h is None or h.shape[1:] != (self.weights.shape[1] - 1,):
            raise ConfigError(
                "monitor.probe=true: this method does not report the features of its encoder as "
                "MethodOutput.embedding; set monitor.probe=false"
            )

        assert batch.labels is not None
        x = F.pad(h.detach().float(), (0, 1), value=1.0)  # [b, D + 1]
        labels = batch.labels[-len(x) :]
        known = labels >= 0

        logits = x @ self.weights.T  # [b, classes]
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        errors = logits.softmax(1) - F.one_hot(labels.clamp_min(0), len(self.weights))
        gradient = (errors * known[:, None]).T @ x  # [classes, D + 1]

        local = torch.stack([loss, right.float(), known.sum().float()])
        total = dist.sum_nograd(torch.cat([gradient.flatten(), local]))
        loss, right, count = total[-3:]
        if not result.skipped:
            self._update(total[:-3].view_as(gradient) / count.clamp_min(1))

        return {"probe/loss": loss / count, "probe/top1": 100 * right / count}

    def _update(self, gradient: Tensor) -> None:
        """One step of Adam; a gradient that is not finite counts as zero."""
        self.steps += 1
        steps = int(self.steps)
        gradient = torch.where(gradient.isfinite().all(), gradient, 0.0)

        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        rate = RATE * math.sqrt(1 - BETAS[1] ** steps) / (1 - BETAS[0] ** steps)
        self.weights.addcdiv_(self.mean, self.square.sqrt().add_(EPSILON), value=-rate)

    def state(self) -> dict[str, Piece]:
        """This rank's pieces of a checkpoint."""
        return pieces(self._placed())

    def restore(self, saved: SavedTensors) -> list[str]:
        """Take the state of a checkpoint of any world size. Returns a note where it has none of
        these classes and features, and the probe starts at zero.
        """
        placed, names = self._placed(), set(saved.names())
        for name, shard in placed.items():
            if name not in names or tuple(saved.shape(name)) != shard.shape:
                what = "has one of other classes or features" if name in names else "has none"
                return [f"the online probe starts at zero: the checkpoint {what}"]

        for name, shard in placed.items():
            shard.fill(saved.read(name))

        return []

    def _placed(self) -> dict[str, Shard]:
        return {f"{PROBE}{name}": replica(tensor) for name, tensor in vars(self).items()}


def open_probe(stream: Stream, features: int, device: torch.device) -> OnlineProbe:
    """The probe of a run's data. Raises ConfigError where that has no labels. Every rank calls it.

    features: width of the encoder's output.
    """
    # of rank 0, which alone looks at every label
    counted: list[int] = []
    run_folder.on_main(lambda: counted.append(_classes(stream)))
    classes: int = dist.broadcast_object(counted[0] if counted else 0)
    return OnlineProbe(features, classes, device)


def _classes(stream: Stream) -> int:
    labels = stream.labels()
    if labels is None:
        return SYNTHETIC_CLASSES
    if labels.max() < 0:
        raise ConfigError(
            f"monitor.probe=true needs labels, and {stream.unlabelled()}; write the shards with "
            "labels, or set monitor.probe=false"
        )

    return int(labels.max()) + 1
