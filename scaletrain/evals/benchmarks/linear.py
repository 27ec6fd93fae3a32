"""Linear probe on a frozen backbone: SGD on random crops, or on features that are encoded once,
with the protocol of a paper.

Learning rates are trained side by side on the same features, and chosen on held-out training
images. The test set is scored once, by the chosen head at its last epoch. differs: SwAV reports its
best epoch on the test set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from scaletrain.config.schema import Count, Frozen
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.features import some, watch
from scaletrain.evals.heads.classifier import finite, resident
from scaletrain.evals.heads.sgd import Heads, Schedule, Sgd, carve, fit, shuffled
from scaletrain.evals.open_dataset import SplitName
from scaletrain.evals.predictions import Score, metric_name
from scaletrain.evals.scores import accuracy, chosen_by

Protocol = Literal["sweep", "simclr", "byol", "relicv2", "moco", "swav"]

# What the protocols set, in place of the defaults of Config.
PROTOCOLS: dict[Protocol, dict[str, Any]] = {
    "sweep": {},
    # SimCLR, appendix B.6
    "simclr": {"epochs": 90, "batch": 4096, "rates": (0.1,), "refit": True},
    # BYOL, appendix C.1
    "byol": {"epochs": 80},
    # ReLICv2's configs/eval.py
    "relicv2": {"rates": (0.3,), "refit": True},
    # MoCo's main_lincls.py
    "moco": {
        "batch": 256,
        "rates": (30.0,),
        "nesterov": False,
        "schedule": "steps",
        "milestones": (0.6, 0.8),
        "refit": True,
    },
    # SwAV's eval_linear.py
    "swav": {
        "batch": 256,
        "rates": (0.3,),
        "nesterov": False,
        "weight_decay": 1e-6,
        "schedule": "cosine_by_epoch",
        "refit": True,
    },
}
# The test transforms of their code.
TRANSFORMS = {"byol": "byol", "relicv2": "byol", "moco": "tv", "swav": "tv"}


class Config(Frozen):
    protocol: Protocol = "sweep"
    """Of a paper: sets the fields below where they are not given, and says in the result which were
    given otherwise; sweep: BYOL's rates for ReLICv2's 100 epochs."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    batch: Count = 1024
    """Samples per step; at most all training images."""

    rates: Annotated[
        tuple[Annotated[float, Field(ge=1e-12, le=1e6)], ...], AfterValidator(some)
    ] = (0.4, 0.3, 0.2, 0.1, 0.05)
    """Per 256 samples of the batch."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    schedule: Schedule = "cosine"
    """Of the rate: cosine to zero by step, or by epoch; steps: a tenth after each milestone."""

    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the training, for the schedule steps."""

    augment: bool = True
    """Random crops and flips, encoded again each epoch; false: the test transform, encoded once."""

    refit: bool = False
    """Train on all training images at the chosen rate before the test; a single rate is not chosen,
    and is trained once."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the order of samples."""

    @model_validator(mode="before")
    @classmethod
    def _from_protocol(cls, given: Any) -> Any:
        """The fields of the protocol, where they are not given."""
        if not isinstance(given, Mapping) or not isinstance(given.get("protocol"), str):
            return given
        return {**PROTOCOLS.get(given["protocol"], {}), **given}

    @property
    def chooses(self) -> bool:
        """Whether a rate is chosen on held-out images."""
        return len(self.rates) > 1 or not self.refit

    def differences(self, transform: Mapping[str, Any], samples: int) -> dict[str, Any]:
        """Settings that differ from those of the protocol of this name, on so many samples."""
        if self.protocol == "sweep":
            return {}

        usual = Config(protocol=self.protocol)
        own, theirs = (one.model_dump(mode="json", exclude={"seed"}) for one in (self, usual))
        changed = {key: value for key, value in own.items() if value != theirs[key]}
        if transform["resize"] != TRANSFORMS.get(self.protocol, transform["resize"]):
            changed["features.resize"] = transform["resize"]
        if samples < self.batch:
            changed["batch"] = samples

        return changed


def needs(config: Config, encoder: Encoder) -> Needs:
    """The splits that it trains on, chooses on and tests on."""
    trained: tuple[SplitName, ...] = ("train",) if config.chooses else ()
    trained += ("trainval",) if config.refit else ()
    held_out: tuple[SplitName, ...] = ("val",) if config.chooses else ()
    stored = () if config.augment else trained
    return Needs((*stored, *held_out, "test"), augmented=config.augment)


def measure(config: Config, context: EvalContext) -> Score:
    """Run the benchmark."""
    metric = chosen_by(context.dataset.metric)
    samples = context.samples("train" if config.chooses else "trainval")
    changed = config.differences(context.transform, samples)
    if changed:
        print(
            f"warning: linear.protocol={config.protocol} with other settings than the paper's: "
            f"{', '.join(f'{key}={value}' for key, value in changed.items())}; the result says so",
            file=sys.stderr,
        )

    best, choice = config.rates[0], {}
    if config.chooses:
        heads, samples, batch = _train(config, context, "train", config.rates)
        validation = context.features("val")
        by_rate = [
            accuracy(rank, validation.labels, context.classes)[metric]
            for rank in heads.ranks(validation.x, validation.labels)
        ]
        # of equals the first listed
        number = by_rate.index(max(by_rate))
        best = config.rates[number]
        choice = {
            "chosen_rate": best,
            # then a wider sweep may do better
            "chosen_at_edge": best in (min(config.rates), max(config.rates)),
            f"held_out_{metric}": dict(zip(map(str, config.rates), by_rate, strict=True)),
            "held_out": by_rate[number],
            "held_out_images": len(validation.labels),
        }

    if config.refit:
        heads, samples, batch = _train(config, context, "trainval", (best,))
        number = 0

    queries = context.features("test")
    return Score(
        metric_name("linear", metric),
        {"linear": context.ranked(queries, heads.scores(queries.x, number))},
        {
            **config.model_dump(mode="json"),
            "differs_from_protocol": changed,
            "batch": batch,
            "optimizer": "sgd nesterov" if config.nesterov else "sgd",
            "standardised": False,
            "train_transform": context.augmentation if config.augment else context.transform,
            "chosen_on": "held-out training images" if config.chooses else "nothing",
            "trained_on": samples,
            "reported": "test set, last epoch",
        },
        choice,
    )


def _train(
    config: Config, context: EvalContext, split: SplitName, rates: Sequence[float]
) -> tuple[Heads, int, int]:
    """Heads of the rates, the number of samples they were trained on, and the batch."""
    samples = context.samples(split)
    batch = min(config.batch, samples)
    steps = max(1, round(config.epochs * samples / batch))

    recipe = Sgd(
        config.momentum,
        config.nesterov,
        config.weight_decay,
        config.schedule,
        config.milestones,
        config.epochs,
    )
    batches = islice(_batches(config, context, split, batch), steps)
    scaled = [rate * batch / 256 for rate in rates]
    heads = fit(watch(batches, "linear probe", steps), steps, context.classes, scaled, recipe)

    return heads, samples, batch


def _batches(
    config: Config, context: EvalContext, split: SplitName, batch: int
) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of (features, labels) of a split."""
    if config.augment:
        return carve(context.views(split, config.seed), batch)

    features = context.features(split)
    x, labels = resident(finite(features.x), context.device), features.labels
    return shuffled(x, labels, torch.arange(len(x)), batch, config.seed)
