"""A file of results is of one encoder, protocol and data: named by them, written once, and never
taken for another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kit.evals import backbone, result_files, run_folder, save, settings, shards

from scaletrain import exit_codes
from scaletrain.checkpoint import files
from scaletrain.config import load, schema
from scaletrain.data.reading import subset
from scaletrain.data.reading.reader import Shards
from scaletrain.evals import benchmark, results
from scaletrain.evals import run as evals
from scaletrain.evals.encoders import targets
from scaletrain.evals.errors import EvalError
from scaletrain.evals.predictions import named_metrics, unpack
from scaletrain.evals.request import Request
from scaletrain.evals.run import Evaluation

QUICK = ("features.workers=0", "features.batch=32")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train = shards(tmp_path / "data" / "train", [i % 6 for i in range(36)])
    shards(tmp_path / "data" / "test", [i % 6 for i in range(12)], seed=1)
    return run_folder(tmp_path, train)


def knn(target: Path, *changes: str, **options: Any) -> dict[str, Any]:
    (result,) = evals.run(target, ["knn"], overrides=(*QUICK, *changes), **options)
    return result


def test_whatever_defines_a_result_has_a_file_of_its_own(run: Path) -> None:
    root = run.parent
    other, bank = (
        shards(root / "other", [i % 6 for i in range(12)], seed=2),
        shards(root / "bank", [i % 6 for i in range(24)], seed=3),
    )
    few = root / "few.json"
    subset.save(few, Shards(root / "data" / "train"), np.arange(12), "by hand")
    save(run, 9, backbone(settings("x"), seed=12))
    old = run / "checkpoints" / "step-00000007"
    found = [
        knn(old),
        knn(run),  # step 9
        knn(old, test=other),
        knn(old, train=bank, test=root / "data" / "test"),
        knn(old, labels=few),
        knn(old, same_numbers=True),
        knn(old, encoder="untrained"),
        knn(old, encoder="pixels"),
        *(
            knn(old, change)
            for change in (
                "knn.temperature=0.2",
                "knn.ks=[10]",
                "features.size=32",
                "features.resize=tv",
                "features.bf16=true",
                "features.on_bad=skip",
            )
        ),
    ]
    assert (
        len({result["file"] for result in found}) == len(found) == len(result_files(run / "evals"))
    )
    assert all(
        json.loads(Path(r["file"]).read_text()) == {k: v for k, v in r.items() if k != "file"}
        for r in found
    )
    # how many images a forward pass has does not define a result
    assert knn(old, "features.batch=8")["file"] == found[0]["file"]


# A change of every setting of the benchmarks.
CHANGES = {
    "fewshot": ("shots=[1]", "draws=2", "strength=1", "seed=1"),
    "knn": ("ks=[7]", "temperature=0.1"),
    "linear": (
        *("protocol=moco", "epochs=3", "batch=16", "rates=[0.1]", "momentum=0.8", "nesterov=false"),
        *("weight_decay=1e-4", "schedule=steps", "milestones=[0.5]", "augment=false"),
        *("refit=true", "seed=1"),
    ),
    "logistic": ("strengths=44", "weakest=1e-5", "strongest=1e4", "tolerance=1e-5", "iterations=5"),
    "predict": (),
    "svm": (
        *("costs=[1]", "positive_weight=1", "folds=2", "choose_by=accuracy"),
        *("average_precision=false", "tolerance=1e-5", "iterations=3", "least_length=1e-6"),
    ),
}


def planned(run: Path, *changes: str, name: str = "knn", train: Path | None = None) -> str:
    """The digest in the name of a result, before anything is measured."""
    wanted = Request((name,), train=None if train is None else str(train), overrides=changes)
    return Evaluation(run, wanted).path(name).stem.rpartition("-")[2]


def test_one_bit_of_a_weight_changes_the_name(run: Path) -> None:
    first, state = planned(run), backbone(settings("x"))
    state["layer1.0.conv1.weight"].flatten()[:1].view(torch.int32).bitwise_xor_(1)
    shutil.rmtree(run / "checkpoints")
    save(run, 7, state)
    assert planned(run) != first


def test_one_image_and_one_label_change_the_name(run: Path) -> None:
    labels = [i % 6 for i in range(24)]
    changed = [1, *labels[1:]]
    sets = ((labels, labels), (labels, changed), (changed, labels), (labels, labels))
    folder = run.parent / "data"
    found = [
        planned(run, train=shards(folder / f"train{number}", own, colours=colours))
        for number, (own, colours) in enumerate(sets)
    ]
    assert found[3] == found[0]
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", benchmark.names())
def test_every_setting_changes_the_name(run: Path, name: str) -> None:
    keys = [change.partition("=")[0] for change in CHANGES[name]]
    assert sorted(keys) == sorted(benchmark.load(name).Config.model_fields)
    if name != "predict":
        found = [planned(run, f"{name}.{change}", name=name) for change in CHANGES[name]]
        assert len({planned(run, name=name), *found}) == len(found) + 1


def test_the_stream_of_augmented_images_is_part_of_the_name(run: Path) -> None:
    """The images of a batch come in another order with another `features.batch`."""
    for change, differs in ((), True), (("linear.augment=false",), False):
        sizes = {planned(run, f"features.batch={n}", *change, name="linear") for n in (8, 12)}
        assert len(sizes) == 1 + differs


def test_weights_of_the_same_step_are_told_apart(run: Path) -> None:
    first = knn(run)
    shutil.rmtree(run / "checkpoints")
    save(run, 7, backbone(settings("x"), seed=12))
    second = knn(run)
    assert first["file"] != second["file"]
    assert first["protocol"] == second["protocol"]


def test_a_result_that_is_there_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the data lies elsewhere by now, as it is known by its content; deleting the file
    measures again.
    """
    said: list[str] = []
    first = knn(run, notice=said.append)
    assert not said
    written = Path(first["file"]).stat()
    (run.parent / "data").rename(run.parent / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(
            "scaletrain.evals.benchmarks.knn.measure", lambda *_: pytest.fail("it measured again")
        )
        again = knn(
            run, "features.workers=1", notice=said.append, train=run.parent / "moved" / "train"
        )
    assert again == first
    assert said == [
        f"knn: read from {first['file']}, measured before; delete this file to measure again"
    ]
    now = Path(first["file"]).stat()
    assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    Path(first["file"]).unlink()
    third = knn(run, train=run.parent / "moved" / "train")
    assert third["metrics"] == first["metrics"]
    assert third["measured"] > first["measured"]


def test_a_damaged_result_is_neither_read_nor_overwritten(run: Path) -> None:
    file = Path(knn(run)["file"])
    for damage in (
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"size": 16', '"size": 17'),
    ):
        whole = file.read_text()
        file.write_text(damage(whole))
        damaged = file.read_text()
        with pytest.raises(
            EvalError, match=rf"{file} is not a result of this version of `scaletrain eval` \("
        ):
            knn(run)
        assert file.read_text() == damaged
        file.write_text(whole)
    assert knn(run)["file"] == str(file)


def test_a_file_may_be_renamed_but_not_to_the_name_of_another(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (Path(knn(run, f"knn.ks=[{k}]")["file"]) for k in (1, 2))
    shutil.copy(first, run / "evals" / "a copy of it.json")
    assert len(results.read(run / "evals")) == 2
    assert "a copy of it.json" in capsys.readouterr().err
    first.replace(second)
    with pytest.raises(EvalError, match=rf"{second} contains another result than its name says"):
        knn(run, "knn.ks=[2]")


def test_the_quicker_of_two_processes_stands(tmp_path: Path, run: Path) -> None:
    file = Path(knn(run)["file"])
    first = json.loads(file.read_text())
    assert (
        results.write(file, first | {"seconds": 1e9}, {}) == first == json.loads(file.read_text())
    )


def test_what_cannot_be_written_is_not_lost(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "durable", SimpleNamespace(write=full))
    with pytest.raises(
        EvalError,
        match=r'cannot write .*knn@data-step-7-.*: No space left on device; measured were \{"knn_',
    ) as error:
        knn(run)
    assert exit_codes.of(error.value) == exit_codes.RETRY


def test_other_forms_are_passed_over_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An old card, foreign JSON, damage, a changed file, a folder."""
    result = knn(run)
    file, folder = Path(result["file"]), run / "evals"
    whole = json.loads(file.read_text())

    def altered(change: Callable[[dict[str, Any]], Any]) -> str:
        content = json.loads(json.dumps(whole))
        change(content)
        return json.dumps(content)

    strange = {
        "knn-step-7.json": json.dumps(
            {"encoder": "trained", "step": 7, "metrics": {"knn_10": 1.0}}
        ),
        "empty.json": "",
        "list.json": "[]",
        "nested.json": "[" * 100_000,
        "bytes.json": "\udcff",
        file.name.replace("knn", "nan"): altered(
            lambda c: c["metrics"].update(knn_10=float("nan"))
        ),
        file.name.replace("knn", "id"): altered(
            lambda c: c["identity"]["protocol"].update(train="0" * 64)
        ),
        file.name.replace("knn", "bare"): altered(lambda c: c["data"].pop("test")),
        file.name.replace("knn", "new"): altered(lambda c: c.update(format=3)),
        file.name.replace("knn", "main"): altered(lambda c: c.update(main="svm")),
        file.name.replace("knn", "half"): altered(lambda c: c["intervals"].popitem()),
        file.name.replace("knn", "out"): altered(
            lambda c: c["predictions"].update(file="../../up.npz")
        ),
        file.name.replace("knn", "up"): altered(lambda c: c.update(benchmark="../../up")),
        file.name.replace("knn", "esc"): altered(lambda c: c["metrics"].update({"\x1b[2J\n": 1.0})),
    }
    for name, content in strange.items():
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    (folder / "folder.json").mkdir()
    (found,) = results.read(folder)
    assert found.metrics == result["metrics"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(strange) + 1
    assert all(
        any(line.startswith(f"skipped: {folder / name} is not a result") for line in lines)
        for name in (*strange, "folder.json")
    )


def test_of_two_results_of_one_step_the_newer_counts(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = Path(knn(run)["file"])
    shutil.rmtree(run / "checkpoints")
    save(run, 7, backbone(settings("x"), seed=12))
    newer = Path(knn(run)["file"])
    (found,) = results.read(run / "evals")
    assert (
        found.identity.encoder["weights"]
        == json.loads(newer.read_text())["identity"]["encoder"]["weights"]
    )
    assert (
        capsys.readouterr().err
        == f"skipped: {older}: {newer.name} has the same step and protocol, and is not older\n"
    )


def test_runs_that_normalise_differently_have_one_protocol(run: Path) -> None:
    """How its images are normalised belongs to an encoder; the size that they are scaled to does
    not.
    """
    first = knn(run)
    cfg = settings(run.parent / "data" / "train")
    for changes, alike in (
        ({"mean": (0.5, 0.5, 0.5)}, True),
        ({"views": (schema.View(size=32),)}, False),
    ):
        (run / "config.yaml").write_text(
            load.dump(cfg.model_copy(update={"data": cfg.data.model_copy(update=changes)}))
        )
        second = knn(run)
        assert second["file"] != first["file"]
        assert (second["protocol"]["digest"] == first["protocol"]["digest"]) == alike


def test_exported_files_of_one_folder(run: Path) -> None:
    cfg = settings(run.parent / "data" / "train")
    found = []
    for name, seed in (("a", 11), ("b", 11), ("c", 12)):
        file = run.parent / "out" / f"{name}.safetensors"
        files.export(backbone(cfg, seed), file, targets.describe(cfg, 7))
        found.append(Path(knn(file)["file"]))
    digests = [path.stem.rpartition("-")[2] for path in found]
    assert [path.name for path in found] == [
        f"{n}-knn@data-step-7-{d}.json" for n, d in zip("abc", digests, strict=True)
    ]
    assert (
        digests[0] == digests[1] == Path(knn(run)["file"]).stem.rpartition("-")[2]
    )  # the same encoder as the run's
    assert digests[0] != digests[2]


def test_a_hidden_file_has_a_visible_result(run: Path) -> None:
    file = run.parent / ".hidden.safetensors"
    targets.export(run, targets.step_of(run), targets.ENCODER, file)
    options = {part: run.parent / "data" / part for part in ("train", "test")}
    assert Path(knn(file, **options)["file"]).name.startswith("hidden-knn@data-step-7-")


def test_predictions_lie_beside_their_result(run: Path) -> None:
    """The metrics and intervals are those of the predictions, whose bytes the result knows."""
    result = knn(run)
    packed = Path(result["file"]).with_suffix(".npz")
    assert result["predictions"]["file"] == packed.name
    assert result["predictions"]["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    found = unpack(packed)
    assert found["knn_10"].index.tolist() == list(range(12))
    assert {name: value for name, _, _, value in named_metrics(found)} == result["metrics"]
    assert result["main"] == "knn_20"
    for name, (low, high) in result["intervals"].items():
        assert 0 <= low <= result["metrics"][name] <= high <= 100


def test_results_of_the_first_format_are_read(run: Path) -> None:
    result = knn(run)
    file = Path(result["file"])
    older = json.loads(file.read_text()) | {"format": 1}
    for key in ("main", "intervals", "predictions", "dataset"):
        del older[key]
    file.write_text(json.dumps(older))
    (found,) = results.read(run / "evals")
    assert (found.main, found.metrics, found.intervals) == ("knn_10", result["metrics"], {})


def test_one_of_two_processes_measures(run: Path) -> None:
    """The other waits, and reads."""
    request = Request(("knn",), overrides=QUICK)
    path = Evaluation(run, request).path("knn")
    assert not path.exists()
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(Evaluation(run, request).result, "knn", said.append) for _ in range(2)]
    first, second = (one.result() for one in both)
    assert first == second == {**json.loads(path.read_text()), "file": str(path)}
    assert len(said) == 1
