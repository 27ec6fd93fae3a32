"""What benchmarks work on: an encoder, a labelled training and test set, and their features."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from scaletrain.data.loading import loader
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.replacement import admit
from scaletrain.data.reading.subset import load as load_subset
from scaletrain.data.reading.subset_shards import SubsetShards
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.evals.classes import LabelledSet, match
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import FeatureConfig, FeatureExtractor, Features, mask
from scaletrain.evals.network import Network, load

# Features [K, D] of the samples that can be read, and a mask [N] bool of which these are.
Encoded = tuple[Tensor, Tensor]


class EvalContext:
    """An encoder with a training and a test set. Features are computed once and shared by all
    benchmarks.

    With a label subset, the training set is the samples of the subset, numbered 0, 1, ... in their
    order, and no other image is read. Samples that are left out because they cannot be read do not
    belong to their set either.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: FeatureConfig,
        train: str | Path,
        test: str | Path,
        subset: Path | None = None,
        same_numbers: bool = False,
    ) -> None:
        """Raises DataError for a `subset` of other shards than `train`, EvalError where labels do
        not fit together.
        """
        self.extractor = FeatureExtractor(encoder, settings)
        self.encoder, self.settings = encoder, settings
        self.skip, self.max_bad = self.extractor.skip, self.extractor.max_bad
        self.train, self.test = str(train), str(test)

        self._opened: dict[str, Shards] = {}
        train_shards, test_shards = self._shards(self.train), self._shards(self.test)
        # The shards of the training set, or those of their samples that belong to it.
        self._train: Shards | SubsetShards = train_shards
        self._subset: dict[str, Any] | None = None
        self._subset_sha: str | None = None

        if subset is None:
            train_labels = LabelledSet(
                self.train,
                self.train,
                train_shards.labels(),
                train_shards.fingerprint,
                train_shards.unlabelled(),
            )
        else:
            found = load_subset(subset, train_shards)
            self._train = SubsetShards(train_shards, found.index)
            train_labels = LabelledSet(
                self.train, str(subset), found.labels, train_shards.fingerprint
            )
            digest = hashlib.sha256(subset.read_bytes()).hexdigest()
            self._subset = {
                "file": subset.name,
                "sha256": digest,
                "samples": len(found.index),
                "rule": found.rule,
            }

            self._subset_sha = self._train.fingerprint

        test_labels = LabelledSet(
            self.test,
            self.test,
            test_shards.labels(),
            test_shards.fingerprint,
            test_shards.unlabelled(),
        )
        self.matched = match(train_labels, test_labels, same_numbers)
        # Labels of the training set.
        self._labels = self.matched.train
        self._left_out: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
        self._bank: Features | None = None
        self._queries: Features | None = None

    @property
    def samples(self) -> int:
        """Number of training samples."""
        if self.skip:
            # Only a pass over the set shows which samples can be read.
            self.bank()
        return len(self._labels)

    @property
    def classes(self) -> int:
        """Number of classes in the training set."""
        return self.matched.count

    @property
    def subset_labels(self) -> Tensor | None:
        """The labels [N] of the label subset; None without one."""
        return None if self._subset is None else self._labels

    def bank(self) -> Features:
        """Features of all training images under the test transform."""
        if self._bank is None:
            x, good = self._encode("train", "training images", self._train)
            if not good.all():
                self._train = SubsetShards(self._train, good.nonzero().flatten().numpy())
                self._labels = self._labels[good]

            self._bank = Features(x, self._labels)

        return self._bank

    def queries(self) -> Features:
        """Features of all test images under the test transform."""
        if self._queries is None:
            x, good = self._encode("test", "test images", self._shards(self.test))
            self._queries = Features(x, self.matched.test[good])
        return self._queries

    @cached_property
    def network(self) -> Network:
        """The whole network of the run under evaluation. Raises EvalError where there is none."""
        encoder = self.encoder
        if encoder.kind != "trained" or encoder.run is None:
            what = encoder.source if encoder.run is None else f"the {encoder.kind} encoder"
            raise EvalError(
                f"{what} is an encoder without the heads of its run; give the run folder or a step "
                "of it, and no --encoder"
            )

        return load(encoder.source)

    def outputs(self, module: nn.Module) -> Features:
        """Outputs [N, D] of a module for all test images under the test transform, in place of the
        encoder's features.
        """
        extractor = FeatureExtractor(replace(self.encoder, module=module), self.settings)
        found = extractor.encode(
            self.test, self._shards(self.test), "test images", extractor.transform_of("test")
        )
        self._left_out["test"] = list(found.left_out)

        return Features(found.x, self.matched.test[found.index])

    def part(self, rows: Tensor) -> Features:
        """Features of the training images `rows` (ascending numbers) under the test transform; no
        other image is read.
        """
        if self.skip or self._bank is not None:
            return Features(self.bank().x[rows], self._labels[rows])

        x, _ = self._encode("train", "held-out images", SubsetShards(self._train, rows.numpy()))
        return Features(x, self._labels[rows])

    def augmented(self, wanted: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless stream of (features [b, D], labels [b]) on the device, of randomly cropped and
        flipped training images; each epoch in a new order.

        wanted: mask [N] bool of the training images to yield.
        """
        batch = min(self.settings.batch, self.samples)
        data = self.encoder.data.plain(
            path=self.train,
            mixture=(),
            subset="",
            groups="",
            epoch_samples=0,
            # Lanes must divide the batch.
            lanes=math.gcd(batch, self.encoder.data.lanes),
            workers=self.settings.workers,
            on_bad="skip" if self.skip else "raise",
            views=(self.extractor.view,),
        )

        stream = loader.stream_of(
            data,
            self._train,
            seed=seed,
            batch=batch,
            rank=0,
            world=1,
            device=self.extractor.device,
        )

        def lost(_: int, replaced: Sequence[Replaced]) -> None:
            """Refuse substitutes: unreadable samples were left out before, and a substitute may lie
            outside the label subset.
            """
            for one in replaced:
                raise EvalError(f"{one.fault}; this sample could be read before")

        try:
            for part in stream.batches(0, sys.maxsize, lost):
                number = part.index.cpu()
                keep = wanted[number]
                yield (
                    self.extractor.forward(part, keep.to(self.extractor.device)),
                    self._labels[number[keep]].to(self.extractor.device),
                )
        finally:
            stream.close()
            self._train.close()

    # --- for the result ---

    @property
    def transform(self) -> dict[str, Any]:
        """The test transform, as written in results."""
        return self.extractor.transform

    @property
    def augmentation(self) -> dict[str, Any]:
        """The random view of `augmented`, as written in results."""
        return self.extractor.augmentation

    @property
    def identity(self) -> dict[str, Any]:
        """All that defines a measurement besides the encoder and the benchmark; known before
        anything is measured.
        """
        transform = {
            key: value for key, value in self.transform.items() if key not in ("mean", "std")
        }
        policy = (
            {"on_bad": "skip", "max_pixels": self.encoder.data.max_pixels}
            if self.skip
            else {"on_bad": "raise"}
        )

        return {
            "features": {**transform, "batch": self.settings.batch, **policy},
            "train": self._shards(self.train).fingerprint,
            "test": self._shards(self.test).fingerprint,
            "labels": self._subset_sha,
            "classes": {"matched": self.matched.matched, "sha256": self.matched.sha256},
        }

    def provenance(self) -> dict[str, Any]:
        """The data as written in results: for both sets the path, the number of samples, the sha256
        of all bytes and the samples left out; the classes; the label subset.
        """
        data: dict[str, Any] = {}

        for name, path in (("train", self.train), ("test", self.test)):
            shards = self._shards(path)
            data[name] = {"path": path, "samples": len(shards), "sha256": shards.fingerprint}
            if self.skip:
                data[name]["left_out"] = self._left_out[name]
                data[name]["left_out_of_index"] = sum(loss.samples for loss in shards.losses)

        data["classes"] = {"count": self.classes, "matched": self.matched.matched}
        return data | ({} if self._subset is None else {"labels": self._subset})

    def _shards(self, path: str) -> Shards:
        """The shards of a folder or address, opened once: remote ones fetch a list."""
        if path not in self._opened:
            found = Shards(path, cache=self.encoder.data.cache, skip=self.skip)
            admit(found.losses, "skip" if self.skip else "raise", self.max_bad, "--set features.")
            self._opened[path] = found

        return self._opened[path]

    def _encode(
        self, name: Literal["train", "test"], what: str, shards: Shards | SubsetShards
    ) -> Encoded:
        """Features of all samples of a set or of its subset, and a mask of those that can be
        read.
        """
        path = self.train if name == "train" else self.test
        found = self.extractor.encode(path, shards, what, self.extractor.transform_of(name))
        self._left_out[name] = list(found.left_out)
        return found.x, mask(found.index, len(shards))
