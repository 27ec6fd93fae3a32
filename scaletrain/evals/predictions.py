"""What a benchmark predicts for every test sample: metrics, intervals and paired tests are all
computed from it.

A file of predictions is an .npz archive without pickled objects. It keeps sample numbers and labels
once where several predictions have the same ones; a rank and a predicted class take two bytes each
below 32,768 classes, so 50,000 ImageNet images of one prediction are about 200 KB.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scaletrain.evals.errors import EvalError
from scaletrain.evals.scores import accuracy, average_precision

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

FORMAT = 1
# Larger files, packed or unpacked, are not predictions.
_BYTES = 4 << 30


@dataclass(frozen=True)
class Ranked:
    """Predictions of one class for each of Q samples."""

    # numbers of the samples in the shards of the test split, ascending
    index: Tensor  # [Q] int64
    labels: Tensor  # [Q] int64, in 0 .. classes - 1
    # how many classes the classifier places before the true one, as in scores.ranks; 0 is right
    rank: Tensor  # [Q] int64
    # the class placed first
    predicted: Tensor  # [Q] int64
    classes: int

    def metrics(self) -> dict[str, float]:
        """In per cent: top1, top5 from five classes on, per_class."""
        return accuracy(self.rank, self.labels, self.classes)


@dataclass(frozen=True)
class Drawn:
    """Predictions of R classifiers for the same Q samples, which differ by the training images that
    were drawn for them.
    """

    # numbers of the samples in the shards of the test split, ascending
    index: Tensor  # [Q] int64
    labels: Tensor  # [Q] int64, in 0 .. classes - 1
    # as in Ranked
    rank: Tensor  # [R, Q] int64
    predicted: Tensor  # [R, Q] int64
    classes: int

    def metrics(self) -> dict[str, float]:
        """Means over the draws in per cent: top1, top5 from five classes on, per_class."""
        draws = [accuracy(rank, self.labels, self.classes) for rank in self.rank]
        return {name: fmean(one[name] for one in draws) for name in draws[0]}


@dataclass(frozen=True)
class Scored:
    """Scores of every class for each of Q samples, which may show several classes or none."""

    # numbers of the samples in the shards of the test split, ascending
    index: Tensor  # [Q] int64
    # 1: the sample shows the class; 0: it does not; -1: it does not count for this class, such as
    # VOC's difficult objects
    labels: Tensor  # [Q, C] int8
    scores: Tensor  # [Q, C] float32

    def metrics(self) -> dict[str, float]:
        """In per cent: map, map11."""
        means = average_precision(self.scores, self.labels)
        return {name: 100 * float(value) for name, value in means.items()}


Prediction: TypeAlias = Ranked | Drawn | Scored


@dataclass(frozen=True)
class Score:
    """What a benchmark measured.

    predictions: by name, e.g. knn_20; a result has the metrics `knn_20` (the top-1), `knn_20_top5`
    and so on, each with an interval. main: the name of the metric that tables show first.
    protocol: how it was measured, alike for every encoder. found: what it came upon, such as a
    chosen learning rate.
    """

    main: str
    predictions: Mapping[str, Prediction]
    protocol: Mapping[str, Any]
    found: Mapping[str, Any] = field(default_factory=dict)


def metric_name(prediction: str, metric: str) -> str:
    """The name in results: knn_20, top1 -> knn_20; knn_20, top5 -> knn_20_top5."""
    return prediction if metric == "top1" else f"{prediction}_{metric}"


def named_metrics(predictions: Mapping[str, Prediction]) -> Iterator[tuple[str, str, str, float]]:
    """Every metric of named predictions: (name in results, prediction, metric, per cent)."""
    for name, prediction in predictions.items():
        for metric, value in prediction.metrics().items():
            yield metric_name(name, metric), name, metric, value


def pack(predictions: Mapping[str, Prediction]) -> Arrays:
    """Named arrays for np.savez_compressed, which `unpack` reads. Raises EvalError where a
    prediction is inconsistent in itself.
    """
    arrays: Arrays = {"format": np.array([FORMAT])}
    for name, prediction in predictions.items():
        if fault := _fault(prediction):
            raise EvalError(f"prediction '{name}' of a benchmark is inconsistent: {fault}")

        if isinstance(prediction, Ranked | Drawn):
            classes = prediction.classes
            own = {"rank": prediction.rank, "predicted": prediction.predicted}
            packed = {key: _smallest(part, classes) for key, part in own.items()}
            packed["classes"] = np.array([classes])
            labels = _smallest(prediction.labels, classes)
        else:
            packed = {"scores": prediction.scores.cpu().numpy()}
            labels = prediction.labels.cpu().numpy()

        for key, shared in (("index", _smallest(prediction.index)), ("labels", labels)):
            if not _same(arrays.setdefault(key, shared), shared):
                packed[key] = shared

        arrays |= {f"{name}.{key}": part for key, part in packed.items()}

    return arrays


def unpack(path: Path, sha256: str | None = None) -> dict[str, Prediction]:
    """Read a file of predictions by name. Raises EvalError, naming the file, if it is damaged,
    inconsistent, of another version, or has another checksum than `sha256`.
    """
    try:
        return _unpacked(_arrays(path, sha256))
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        MemoryError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)

    # Text from a foreign file must not control the terminal.
    plain = reason.encode("unicode_escape").decode() or "it is too large"
    raise EvalError(
        f"{path} is not a file of predictions of this version of `scaletrain eval` ({plain}); "
        "delete it and its .json, and evaluate again"
    )


def _arrays(path: Path, sha256: str | None) -> Arrays:
    if not path.is_file() or path.stat().st_size > _BYTES:
        raise ValueError("not a regular file of usual size")
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError("its checksum is not that in its .json")

    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _BYTES:
            raise ValueError("it is larger unpacked than predictions are")

    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _unpacked(arrays: Arrays) -> dict[str, Prediction]:
    if (version := arrays["format"].tolist()) != [FORMAT]:
        raise ValueError(f"format {version}, where [{FORMAT}] is known")

    # in the order in which they were packed
    names = dict.fromkeys(key.rpartition(".")[0] for key in arrays if "." in key)
    predictions: dict[str, Prediction] = {}
    for name in names:

        def part(key: str, kind: str, name: str = name) -> Tensor:
            array = arrays.get(f"{name}.{key}", arrays.get(key))
            if array is None:
                raise KeyError(f"{name}.{key}")
            if array.dtype.kind not in kind:
                raise ValueError(f"'{name}.{key}' has the type {array.dtype}")

            return torch.from_numpy(array)

        if f"{name}.scores" in arrays:
            prediction: Prediction = Scored(
                part("index", "iu").long(), part("labels", "i"), part("scores", "f")
            )
        else:
            index, labels, rank, predicted = (
                part(key, "iu").long() for key in ("index", "labels", "rank", "predicted")
            )
            (classes,) = part("classes", "iu").flatten().tolist()
            kind = Drawn if rank.dim() == 2 else Ranked
            prediction = kind(index, labels, rank, predicted, classes)

        if fault := _fault(prediction):
            raise ValueError(f"'{name}': {fault}")

        predictions[name] = prediction

    return predictions


def _fault(prediction: Prediction) -> str:
    """What is inconsistent in a prediction; "" where nothing is."""
    index, labels = prediction.index, prediction.labels
    samples = len(index)
    shape: tuple[int, ...] = (samples,)
    outer: tuple[int, ...] = ()

    if isinstance(prediction, Ranked | Drawn):
        outer = tuple(prediction.rank.shape[:1]) if isinstance(prediction, Drawn) else ()
        rank, predicted, classes = prediction.rank, prediction.predicted, prediction.classes
        parts = {"index": index, "labels": labels, "rank": rank, "predicted": predicted}
        allowed = {"labels": (0, classes - 1), "rank": (0, classes), "predicted": (0, classes - 1)}
    else:
        parts = {"labels": labels, "scores": prediction.scores}
        allowed = {"labels": (-1, 1)}
        shape = (samples, *prediction.scores.shape[1:2])
        if prediction.scores.dim() != 2 or prediction.scores.dtype != torch.float32:
            return "its scores are not a float32 matrix"
        if labels.dtype != torch.int8:
            return "its labels are not int8"

    if samples == 0 or index.dim() != 1:
        return "it has no samples"
    if 0 in outer:
        return "it has no draws"
    for name, part in parts.items():
        due = (*outer, *shape) if name in ("rank", "predicted") else shape
        if part.shape != due:
            return f"its {name} are {list(part.shape)}, not {list(due)}"
    for name, (low, high) in allowed.items():
        if int(parts[name].min()) < low or int(parts[name].max()) > high:
            return f"its {name} are not all in {low} .. {high}"
    if isinstance(prediction, Scored) and not bool((labels == 1).any()):
        return "no sample shows a class"
    if int(index[0]) < 0 or bool((index.diff() <= 0).any()):
        return "its sample numbers do not ascend"
    if isinstance(prediction, Ranked | Drawn) and bool(((rank == 0) & (predicted != labels)).any()):
        return "a sample with rank 0 has another predicted class than its label"

    return ""


def _smallest(numbers: Tensor, largest: int | None = None) -> npt.NDArray[Any]:
    """Non-negative integers in the fewest bytes that hold `largest`, by default their own."""
    largest = int(numbers.max()) if largest is None else largest
    small = next(t for t in (np.int16, np.int32, np.int64) if largest <= np.iinfo(t).max)
    array: npt.NDArray[Any] = numbers.cpu().numpy().astype(small)

    return array


def _same(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)
