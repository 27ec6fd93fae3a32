"""What benchmarks work on: an encoder, an opened dataset, and the features of its splits."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.data.loading import loader
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import Encoded, FeatureConfig, FeatureExtractor, Features, mask
from scaletrain.evals.network import Network, load
from scaletrain.evals.open_dataset import OpenDataset, Part, SplitName
from scaletrain.evals.predictions import Ranked
from scaletrain.evals.scores import place
from scaletrain.evals.transforms import Transform


class EvalContext:
    """An encoder and a dataset. Features are encoded once and shared by all benchmarks.

    Samples that are left out because they cannot be read belong to no split.
    """

    def __init__(
        self, encoder: Encoder, dataset: OpenDataset, settings: FeatureConfig, store: Path | None
    ) -> None:
        """store: folder of stored features; None: none are stored."""
        self.extractor = FeatureExtractor(encoder, settings, store)
        self.encoder, self.dataset, self.settings = encoder, dataset, settings
        self.device = self.extractor.device
        # By "train", of the training and validation images, and "test".
        self._encoded: dict[str, Encoded] = {}
        self._left_out: dict[str, list[dict[str, Any]]] = {}

    @property
    def classes(self) -> int:
        """Number of classes of the training images, which a head tells apart."""
        return self.dataset.classes

    def samples(self, split: SplitName) -> int:
        """Number of images of a split."""
        return len(self._part(split).rows)

    def features(self, split: SplitName) -> Features:
        """Features of the images of a split under the test transform, on the CPU and as a rule
        memory-mapped.

        "trainval" is all training images: "train" and, to choose settings on, "val".
        """
        images = _images(split)
        if split == "val" and images not in self._encoded and not self.extractor.skip:
            # Few of many; a benchmark that trains on augmented images needs no others.
            part = self.dataset.part(split)
            encoded = self.extractor.encode(
                part.path, part.selected, "validation images", self._transform(images)
            )
            return Features(encoded.x, part.labels, part.index)

        return self._select(split, self._encode(images))

    def prepare(self, split: SplitName) -> None:
        """Store the features of a split with the devices of all ranks. Every rank calls it."""
        part = self.dataset.part(split)
        shards = part.selected if split == "val" and not self.extractor.skip else part.shards
        self.extractor.prepare(part.path, shards, split, self._transform(_images(split)))

    def views(self, split: SplitName, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless stream of (features [b, D], labels [b]) on the device, of randomly cropped and
        flipped training images of a split; each epoch in a new order.
        """
        # All training images are read, and those of other splits passed over: so the crops of an
        # image and the order do not depend on which images are held out.
        part = self._part("trainval")
        kept = torch.isin(part.rows, self._part(split).rows)
        batch = min(self.settings.batch, len(part.rows))
        data = self.encoder.data.plain(
            path=part.path,
            mixture=(),
            subset="",
            groups="",
            epoch_samples=0,
            # Lanes must divide the batch.
            lanes=math.gcd(batch, self.encoder.data.lanes),
            workers=self.settings.workers,
            on_bad="skip" if self.extractor.skip else "raise",
            views=(self.extractor.view,),
        )
        shards = part.selected
        stream = loader.stream_of(
            data, shards, seed=seed, batch=batch, rank=0, world=1, device=self.device
        )

        def lost(_: int, replaced: Sequence[Replaced]) -> None:
            """Refuse substitutes: unreadable samples were left out before, and a substitute may lie
            outside the split.
            """
            for one in replaced:
                raise EvalError(f"{one.fault}; this sample could be read before")

        try:
            for images in stream.batches(0, sys.maxsize, lost):
                number = images.index.cpu()
                keep = kept[number]
                # some networks refuse an empty batch
                if keep.any():
                    yield (
                        self.extractor.forward(images, keep.to(self.device)),
                        part.labels[number[keep]].to(self.device),
                    )
        finally:
            stream.close()
            shards.close()

    def ranked(self, features: Features, scores: Tensor) -> Ranked:
        """Predictions for test images from the scores [Q, classes] that a head gives them."""
        rank, predicted = place(self.dataset.best(scores), features.labels)
        return Ranked(features.index, features.labels, rank, predicted, self.dataset.scored)

    # --- whole networks ---

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

        return load(Path(encoder.source))

    def outputs(self, module: nn.Module, split: SplitName) -> Features:
        """Outputs [N, D] of a module for the images of a split under the test transform, in place
        of the encoder's features; they are not stored.
        """
        extractor = FeatureExtractor(replace(self.encoder, module=module), self.settings)
        return self._select(split, self._pass(extractor, _images(split)))

    # --- for the result ---

    @property
    def transform(self) -> dict[str, Any]:
        """The transform of test images, as written in results."""
        data = self.encoder.data
        chosen = self._transform("test").model_dump(mode="json")
        return {**chosen, "mean": data.mean, "std": data.std, "bf16": self.settings.bf16}

    @property
    def augmentation(self) -> dict[str, Any]:
        """The random view of `views`, as written in results."""
        return self.extractor.augmentation

    @property
    def stream(self) -> dict[str, Any]:
        """What defines the images of `views` and their order, besides the split and the seed."""
        data = self.encoder.data
        order = {"batch": self.settings.batch, "lanes": data.lanes, "window": data.window}
        return {**self.augmentation, **order}

    @property
    def identity(self) -> dict[str, Any]:
        """All that defines a measurement besides the encoder and the benchmark; known before
        anything is measured.
        """
        transform = {**self._transform("test").model_dump(mode="json"), "bf16": self.settings.bf16}
        policy = (
            {"on_bad": "skip", "max_pixels": self.encoder.data.max_pixels}
            if self.extractor.skip
            else {"on_bad": "raise"}
        )

        return {"features": {**transform, **policy}, **self.dataset.identity}

    def provenance(self) -> dict[str, Any]:
        """The data as written in results, with the samples that were left out and sentences on test
        images that were seen in training.
        """
        data = self.dataset.provenance()
        trained = self.encoder.kind == "trained"
        if seen := self.dataset.leaks(self.encoder.trained_on if trained else ()):
            data["seen_in_training"] = seen

        if self.extractor.skip:
            for images in ("train", "test"):
                data[images]["left_out"] = self._left_out.get(images, [])

        return data

    def _transform(self, images: str) -> Transform:
        """The test transform, of training or test images; a dataset may have a border that is cut
        from its test images.
        """
        chosen = self.extractor.transform_of(images)
        border = self.dataset.border if images == "test" else 0
        return chosen.model_copy(update={"border": border}) if border else chosen

    def _encode(self, images: str) -> Encoded:
        """Features of all training or all test images."""
        if images not in self._encoded:
            self._encoded[images] = self._pass(self.extractor, images)
        return self._encoded[images]

    def _pass(self, extractor: FeatureExtractor, images: str) -> Encoded:
        part = self.dataset.part("test" if images == "test" else "trainval")
        encoded = extractor.encode(
            part.path, part.shards, f"{images} images", self._transform(images)
        )
        self._left_out[images] = list(encoded.left_out)
        return encoded

    def _select(self, split: SplitName, encoded: Encoded) -> Features:
        """Those features of all training or all test images that belong to a split."""
        part = self._readable(split, encoded)
        rows = torch.searchsorted(encoded.index, part.rows)
        x = encoded.x if len(rows) == len(encoded.x) else encoded.x[rows]

        return Features(x, part.labels, part.index)

    def _part(self, split: SplitName) -> Part:
        """A split without the samples that cannot be read, which only a pass over all shows."""
        if not self.extractor.skip:
            return self.dataset.part(split)
        return self._readable(split, self._encode(_images(split)))

    def _readable(self, split: SplitName, encoded: Encoded) -> Part:
        readable = mask(encoded.index, len(self.dataset.part(split).shards))
        return self.dataset.part(split, (~readable).nonzero().flatten())


def _images(split: SplitName) -> str:
    """Whose shards a split is a part of."""
    return "test" if split == "test" else "train"
