"""`evals.run` from shards and a checkpoint to results, scalars and a report, and the bad input that
must end it.
"""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.evals import backbone, context, result_files, run_folder, save, settings, shards
from typer.testing import CliRunner

from scaletrain.checkpoint import files
from scaletrain.cli.main import app
from scaletrain.data.errors import DataError
from scaletrain.evals import benchmark
from scaletrain.evals import run as evals
from scaletrain.evals.encoders import targets
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.report import cards

QUICK = (
    "linear.epochs=12",
    "linear.batch=16",
    "linear.rates=[30,10,3]",
    "features.batch=32",
    "features.workers=0",
)
BOTH = ("knn", "linear")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on 72 images of six colours, with 24 more in the folder `test` beside them."""
    train = shards(tmp_path / "data" / "train", [i % 6 for i in range(72)])
    shards(tmp_path / "data" / "test", [i % 6 for i in range(24)], seed=1)
    return run_folder(tmp_path, train)


def sums(folder: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_results_and_report(run: Path) -> None:
    before = sums(run)
    found = evals.run(run, BOTH, overrides=(*QUICK, "linear.augment=false", "knn.ks=[1,20]"))
    assert before.items() <= sums(run).items()  # nothing of the run was touched
    assert {path.name.rpartition("-")[0] for path in result_files(run / "evals")} == {
        "knn@data-step-7",
        "linear@data-step-7",
    }
    knn, linear = found
    assert knn["metrics"]["knn_20"] > 40  # of random weights; chance is 17
    assert linear["metrics"]["linear"] > 40
    assert set(knn["metrics"]) == {
        f"knn_{k}{part}" for k in (1, 20) for part in ("", "_top5", "_per_class")
    }
    assert set(linear["metrics"]) == {
        "linear",
        "linear_top5",
        "linear_per_class",
    }
    assert linear["protocol"]["epochs"] == 12
    assert linear["protocol"]["test_transform"]["resize"] == "none"
    for result in found:
        assert (result["encoder"], result["step"], result["unit"]) == ("trained", 7, "per cent")
        assert {"scaletrain", "torch", "numpy", "python"} == set(result["versions"])
        folder = run.parent / "data" / "train"
        contents = [
            hashlib.sha256((folder / f"s-{n}.tar").read_bytes()).hexdigest() for n in (0, 1)
        ]
        whole = hashlib.sha256("".join(contents).encode()).hexdigest()
        assert result["data"]["train"] == {"path": str(folder), "samples": 72, "sha256": whole}
        assert result["data"]["test"]["samples"] == 24
    # one writer of curves: the fleet
    assert not (run / "tensorboard").exists()
    lines = cards.report(found)
    assert lines[0] == "trained encoder, step 7, per cent"
    rows = {
        line.split()[0]: line.split()[1:] for line in lines if line.startswith(("knn", "linear"))
    }
    assert rows == {
        name: [f"{value:.2f}", "{:.2f}-{:.2f}".format(*result["intervals"][name])]
        for result in found
        for name, value in result["metrics"].items()
    }
    assert lines[-2:] == [f"result: {knn['file']}", f"result: {linear['file']}"]


@pytest.mark.parametrize("columns", [None, "40", "80"])
def test_the_command_is_readable_at_any_width_and_in_a_pipe(run: Path, columns: str | None) -> None:
    """The runner is a pipe. No number and no word of the table is cut, and the last line says where
    the result lies.
    """
    options = [part for change in QUICK[3:] for part in ("--set", change)]
    shown = CliRunner().invoke(app, ["eval", str(run), "knn", *options], env={"COLUMNS": columns})
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    (file,) = (run / "evals").glob("*.json")
    content = json.loads(file.read_text())
    start = lines.index(
        next(line for line in lines if line.split() == ["score", "95", "%", "interval"])
    )
    table = lines[start : start + 13]
    assert max(map(len, table)) <= 40
    for line, (name, value) in zip(table[1:], content["metrics"].items(), strict=True):
        low, high = content["intervals"][name]
        assert line.split() == [name, f"{value:.2f}", f"{low:.2f}-{high:.2f}"]
    assert lines[-1] == f"result: {file}"


@pytest.mark.parametrize("encoder", ["untrained", "pixels"])
def test_baselines_get_results_of_their_own(run: Path, encoder: Any) -> None:
    (result,) = evals.run(run, ["knn"], encoder=encoder, overrides=QUICK[3:])
    assert Path(result["file"]).name.startswith(f"knn@data-step-0-{encoder}-")
    assert result["encoder"] == encoder
    assert encoder != "pixels" or result["metrics"]["knn_10"] == 100.0  # the colours are easy
    assert result["about"]
    assert len(result_files(run / "evals")) == 1


def test_an_exported_file_evaluates_like_its_run(run: Path, tmp_path: Path) -> None:
    cfg, file = settings(run.parent / "data" / "train"), tmp_path / "out" / "small.safetensors"
    files.export(backbone(cfg), file, targets.describe(cfg, 7))
    (from_file,) = evals.run(file, ["knn"], overrides=QUICK[3:])
    (from_run,) = evals.run(run, ["knn"], overrides=QUICK[3:])
    assert from_file["metrics"] == from_run["metrics"]
    assert from_file["protocol"] == from_run["protocol"]
    written = Path(from_file["file"])
    assert {p.name for p in file.parent.iterdir()} == {
        written.name,
        written.with_suffix(".npz").name,
        "small.safetensors",
        "features",
        "locks",
    }


def test_the_augmented_probe_learns(run: Path) -> None:
    """The colours are separable in the pixels, whatever the crop."""
    (result,) = evals.run(run, ["linear"], overrides=QUICK, encoder="pixels")
    assert result["metrics"]["linear"] == 100.0
    assert result["protocol"]["train_transform"]["scale"] == [0.08, 1.0]


def test_the_augmented_stream_gives_the_training_images_anew(tmp_path: Path) -> None:
    """Labels are sample numbers here, so the stream tells what it read."""
    train = shards(tmp_path / "train", list(range(40)))
    opened = context(find(run_folder(tmp_path, train), "pixels"), train, train, batch=4)
    wanted = opened.dataset.part("train").rows.tolist()
    assert len(wanted) == 36
    epochs = [
        [next(stream) for _ in range(10)] for stream in [opened.views("train", 0)] for _ in range(2)
    ]
    first, second = (
        {int(n): x for part, labels in epoch for n, x in zip(labels, part, strict=True)}
        for epoch in epochs
    )
    assert sorted(first) == sorted(second) == wanted
    assert list(first) != list(second)  # another order
    assert all(not first[n].equal(second[n]) for n in first)  # another crop
    again = [labels.tolist() for _, labels in islice(opened.views("train", 0), 10)]
    assert again == [labels.tolist() for _, labels in epochs[0]]

    # which images are held out changes neither the order nor the crops of the others
    every = {
        int(n): x
        for part, labels in islice(opened.views("trainval", 0), 10)
        for n, x in zip(labels, part, strict=True)
    }
    assert [n for n in every if n in first] == list(first)
    assert all(every[n].equal(x) for n, x in first.items())


def test_features_are_the_networks_in_sample_order(run: Path) -> None:
    encoder, data = find(run), run.parent / "data"
    opened = context(encoder, data / "train", data / "test", batch=32)
    few = opened.features("val")
    whole = opened.features("trainval")
    assert whole.labels.tolist() == [i % 6 for i in range(72)]
    assert whole.index.tolist() == list(range(72))
    assert whole.x.shape == (72, 32)
    assert whole.x.dtype == torch.float32
    assert len(few.index) == 7
    torch.testing.assert_close(few.x, whole.x[few.index], rtol=0, atol=1e-5)
    assert few.labels.equal(whole.labels[few.index])
    rest = opened.features("train")
    assert sorted([*rest.index.tolist(), *few.index.tolist()]) == list(range(72))
    assert rest.x.equal(whole.x[rest.index])
    # eval mode: no sample sees another
    one = context(encoder, data / "train", data / "test", batch=1).features("trainval")
    torch.testing.assert_close(one.x, whole.x, rtol=0, atol=1e-5)


def test_no_image_is_encoded_twice_for_one_benchmark(run: Path) -> None:
    encoder, data = find(run), run.parent / "data"
    first, second = (context(encoder, data / "train", data / "test", batch=8) for _ in range(2))
    for split in ("trainval", "test"):
        first.features(split)
    module: Any = benchmark.load("logistic")
    module.measure(module.Config(strengths=2), second)
    assert second.extractor.forwards == first.extractor.forwards


def refused(run: Path, text: str, benchmarks: tuple[str, ...] = BOTH, **options: Any) -> None:
    with pytest.raises((EvalError, DataError), match=text) as error:
        evals.run(run, benchmarks, **{"overrides": QUICK, **options})
    assert "\n" not in str(error.value)
    assert not (run / "evals").exists()


@pytest.mark.parametrize(
    ("benchmarks", "overrides", "text"),
    [
        (
            ("linnear",),
            (),
            "unknown benchmark 'linnear' .did you mean 'linear'.*available: fewshot, knn, linear",
        ),
        ((), (), "no benchmark given; available: fewshot, knn, linear"),
        (BOTH, ("linear.epoch=3",), r"unknown key 'linear\.epoch'; did you mean 'epochs'"),
        (BOTH, ("linear.epochs=0",), r"linear\.epochs: .*greater than or equal to 1"),
        (BOTH, ("feature.size=32",), "override of 'feature'.*did you mean 'features'"),
        (("knn",), ("linear.epochs=3",), "override of 'linear', which is not evaluated"),
        (BOTH, ("linear=3",), "linear.*dictionary"),
        *(
            (BOTH, (change,), rf"^{change.partition('=')[0]}(\.0)?: {text}")
            for change, text in (
                (
                    "features.size=7",
                    "write 8 to 4096 pixels, or 0 for the size of the run's largest view",
                ),
                ("features.size=-8", "write 8"),
                ("features.size=5000", "write 8"),
                ("features.batch=0", ".*greater than or equal to 1"),
                ("features.batch=1e30", ".*integer"),
                ("features.workers=1000000", ".*less than or equal to 1024"),
                ("features.resize=crop", ".*'tv'"),
                ("features.on_bad=ignore", ".*'skip'"),
                ("features.max_bad=2", ".*less than or equal to 1"),
                ("knn.ks=[]", "write one or more values"),
                ("knn.ks=[0]", ".*greater than or equal to 1"),
                ("knn.ks=[1e30]", ".*integer"),
                ("knn.temperature=0", ".*greater than or equal to"),
                ("knn.temperature=1e-300", ".*greater than or equal to"),
                ("knn.temperature=.nan", ".*finite"),
                ("knn.temperature=.inf", ".*finite"),
                ("linear.rates=[]", "write one or more values"),
                ("linear.rates=[0]", ".*greater than or equal to"),
                ("linear.rates=[1e300]", ".*less than or equal to"),
                ("linear.rates=[.nan]", ".*finite"),
                ("linear.momentum=1", ".*less than 1"),
                ("linear.epochs=1e12", ".*less than or equal to"),
                ("linear.seed=1e25", ".*integer|.*less than"),
            )
        ),
    ],
)
def test_misspelt_and_senseless_requests(
    run: Path, benchmarks: tuple[str, ...], overrides: tuple[str, ...], text: str
) -> None:
    refused(run, text, benchmarks, overrides=overrides)


def test_no_test_set(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "test").rename(tmp_path / "elsewhere")
    refused(run, "no test set: .*--test")
    assert evals.run(run, ["knn"], test=tmp_path / "elsewhere", overrides=QUICK[3:])
    (tmp_path / "elsewhere").rename(tmp_path / "data" / "val")
    (result,) = evals.run(run, ["knn"], overrides=QUICK[3:], train=tmp_path / "data" / "train")
    assert result["data"]["test"]["path"].endswith(
        "elsewhere"
    )  # the same images: the result is the one of before
    (result,) = evals.run(run, ["knn"], overrides=(*QUICK[3:], "knn.ks=[1]"))
    assert result["data"]["test"]["path"].endswith("val")


@pytest.mark.parametrize("path", ["", "synthetic"])
def test_no_training_set(tmp_path: Path, path: str) -> None:
    refused(
        run_folder(tmp_path, path),
        "no labels to evaluate with; give --dataset, or --train and --test",
    )


def test_remote_shards_name_no_test_set_of_their_own(run: Path) -> None:
    with pytest.raises(
        EvalError,
        match=r"http://127\.0\.0\.1:1/train is remote; give its labelled test shards with --test",
    ):
        evals.run(run, ["knn"], train="http://127.0.0.1:1/train", overrides=QUICK[3:])


def test_missing_labels_are_named(run: Path, tmp_path: Path) -> None:
    some = shards(tmp_path / "some", [0, 1, 2, None, 4, 5])
    refused(run, r"some: 1 of 6 samples have no label", test=some)
    refused(
        run,
        r"some: 1 of 6 samples have no label.*--labels FILE",
        train=some,
        test=tmp_path / "data" / "test",
    )


def test_sets_that_are_no_pair(run: Path, tmp_path: Path) -> None:
    refused(
        run,
        r"test has classes of which .*train has no sample: '9'",
        test=shards(tmp_path / "test", [0, 1, 9, 2]),
    )
    (tmp_path / "data" / "train" / "classes.json").write_text(json.dumps(list("abcdef")))
    refused(run, r"train has a classes\.json and .*test has none")
    (tmp_path / "data" / "test" / "classes.json").write_text(json.dumps(list("abcdeg")))
    refused(run, r"test has classes that .*train/classes\.json does not name: 'g'")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run: Path) -> None:
    save(run, 9, backbone(settings("x"), seed=12))
    (weights,) = (run / "checkpoints" / "step-00000009").glob("*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    (result,) = evals.run(run, ["knn"], overrides=QUICK[3:])
    assert result["step"] == 7


def test_unwritable_results(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the work is done."""
    monkeypatch.setattr(
        "scaletrain.evals.benchmarks.knn.measure", lambda *_: pytest.fail("it measured first")
    )
    (run / "evals").write_text("a file in the way")
    with pytest.raises(EvalError, match=r"cannot write .*evals"):
        evals.run(run, ["knn"], overrides=QUICK[3:])
    (run / "evals").unlink()
    monkeypatch.setattr(
        "os.access", lambda path, mode: Path(path).name != "evals"
    )  # for root may write anywhere
    with pytest.raises(
        EvalError, match=r"cannot write .*knn@data-step-7-.*: the folder is write-protected"
    ):
        evals.run(run, ["knn"], overrides=QUICK[3:])
