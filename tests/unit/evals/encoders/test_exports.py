"""Steps that are kept for their evaluation while the run prunes them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kit.evals import backbone, run_folder, save, settings, shards
from torch import Tensor

from scaletrain.checkpoint import files, reader, writer
from scaletrain.checkpoint.files import CheckpointError
from scaletrain.core import Piece
from scaletrain.evals import network
from scaletrain.evals.encoders import exports, targets
from scaletrain.evals.encoders.exports import exported, hold, release
from scaletrain.evals.encoders.targets import find
from scaletrain.evals.errors import EvalError
from scaletrain.evals.request import Request
from scaletrain.evals.run import Evaluation
from scaletrain.runtime import durable


def saved(run: Path, step: int = 7) -> Path:
    return reader.folder_of(run / "checkpoints", step)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# --- links


def test_a_step_is_kept_until_it_is_released(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    before, names = find(saved(run)), contents(saved(run))

    kept = hold(run, 7)
    assert kept == run / "evals" / "held" / "step-00000007"
    assert contents(kept) == names
    assert all((kept / name).samefile(saved(run) / name) for name in names)
    assert hold(run, 7) == kept

    reader.delete(saved(run))
    now = find(kept)
    assert (now.identity, now.run, now.home) == (before.identity, run, run / "evals")
    assert hold(run, 7) == kept

    release(run, 7)
    release(run, 7)
    assert contents(kept.parent) == []
    with pytest.raises(EvalError, match="step-00000007: there is no such checkpoint"):
        hold(run, 7)


def test_a_step_that_is_not_committed_is_not_kept(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    (saved(run) / reader.MANIFEST).unlink()
    for keep in (hold, exported):
        with pytest.raises(EvalError, match="not complete"):
            keep(run, 7)
    assert contents(run / "evals" / "held") == contents(run / "evals" / "encoders") == []


def linking(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> None:
    """Call `then` with its number before each link is made."""
    link, count = os.link, iter(range(1000))

    def wrapped(source: Path, target: Path) -> None:
        then(next(count))
        link(source, target)

    monkeypatch.setattr(os, "link", wrapped)


def test_a_step_that_is_pruned_while_it_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path, "train")
    linking(monkeypatch, lambda number: reader.delete(saved(run)) if number == 1 else None)
    with pytest.raises(EvalError, match="no such checkpoint"):
        hold(run, 7)
    assert contents(run / "evals" / "held") == []


def test_a_step_that_is_saved_again_while_it_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path, "train")
    other = backbone(settings("train"), seed=12)
    linking(monkeypatch, lambda number: save(run, 7, other) if number == 1 else None)
    kept = hold(run, 7)
    assert torch.equal(find(kept).module.state_dict()["conv1.weight"], other["conv1.weight"])


def test_what_is_saved_again_replaces_what_is_kept_if_it_differs(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    first, number = find(saved(run)).weights, hold(run, 7).stat().st_ino
    save(run, 7, backbone(settings("train")))
    assert hold(run, 7).stat().st_ino == number

    save(run, 7, backbone(settings("train"), seed=12))
    assert find(hold(run, 7)).weights == find(saved(run)).weights != first


def test_steps_of_a_run_that_prunes_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    reader.delete(saved(run))
    over, kept = threading.Event(), set()

    def train() -> None:
        out = writer.Writer(run / "checkpoints", keep_last=1)
        for step in range(8, 38):
            values = torch.full((300,), float(step))
            out.save(step, {f"method.backbone.{i}": Piece(values, 0, (300,)) for i in range(3)}, {})
        out.close()
        over.set()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train)
        while not over.is_set() and running.running():
            for step in reader.steps(run / "checkpoints"):
                try:
                    kept.add(hold(run, step))
                except EvalError:
                    continue
        running.result()

    assert len(kept) > 3
    assert sorted(kept) == sorted((run / "evals" / "held").iterdir())
    for folder in kept:
        step = reader.open_step(folder)
        assert (step.read("method.backbone.2") == step.step).all()


def test_links_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    if (child := os.fork()) == 0:
        with pytest.MonkeyPatch.context() as patch:
            linking(patch, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number else None)
            hold(run, 7)
        os._exit(1)

    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = contents(run / "evals" / "held")
    assert left.startswith(".")
    assert reader.steps(run / "evals" / "held") == {}
    kept = hold(run, 7)
    assert contents(kept.parent) == [kept.name]
    reader.open_step(kept)


# --- exported encoders


def test_an_export_is_the_same_encoder_as_its_step(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train", lanes=3, on_bad="skip")
    meta = {"clock": {"step": 9, "steps_per_epoch": 4}, "samples": 72}
    pieces = {
        f"method.backbone.{name}": Piece(t.flatten(), 0, tuple(t.shape))
        for name, t in backbone(settings("train"), seed=12).items()
    }
    out = writer.Writer(run / "checkpoints", keep_last=5)
    out.save(9, pieces, meta)
    out.close()

    step, file = find(saved(run, 9)), exported(run, 9)
    assert file == run / "evals" / "encoders" / "step-00000009.safetensors"
    shared = find(file)
    assert replace(shared, source=step.source, module=step.module) == step
    assert (shared.source, shared.samples, shared.epochs) == (file, 72, 2.25)
    assert shared.identity == step.identity
    assert find(file, "untrained").identity == find(run, "untrained").identity
    assert contents(run / "evals" / "held") == []

    moved = find(Path(shutil.copy(file, tmp_path / "elsewhere.safetensors")))
    assert (moved.weights, moved.run, moved.samples) == (step.weights, None, 72)


def test_a_killed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path, "train")
    if (child := os.fork()) == 0:
        monkeypatch.setattr(durable, "flush", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        monkeypatch.setattr(files, "flush", durable.flush)
        exported(run, 7)
        os._exit(1)

    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    folder = targets.export_of(run, 7).parent
    assert contents(folder)
    assert not targets.export_of(run, 7).exists()
    file = exported(run, 7)
    assert contents(folder) == [file.name]
    assert find(file).weights == find(saved(run)).weights


def test_a_step_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path, "train")
    calls, export = [], targets.export

    def counted(*arguments: object) -> int:
        calls.append(arguments)
        return export(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(targets, "export", counted)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: exported(run, 7), range(8)))) == 1
    assert len(calls) == 1

    reader.delete(saved(run))
    exported(run, 7)
    assert len(calls) == 1
    with pytest.raises(EvalError, match="no such checkpoint"):
        exported(run, 8)


@pytest.mark.parametrize("damage", ["weights", "configuration", "file"])
def test_an_export_that_is_not_of_the_step_is_written_again(tmp_path: Path, damage: str) -> None:
    run = run_folder(tmp_path, "train")
    file = exported(run, 7)
    if damage == "weights":
        save(run, 7, backbone(settings("train"), seed=12))
    elif damage == "configuration":
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("0.485", "0.5"))
    else:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)

    assert find(exported(run, 7)).identity == find(saved(run)).identity


def test_links_that_a_fleet_holds_stay(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    kept = hold(run, 7)
    reader.delete(saved(run))
    exported(run, 7)
    assert reader.open_step(kept).step == 7


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP])
def test_without_hard_links_the_export_keeps_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = run_folder(tmp_path, "train")

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    linking(monkeypatch, refuse)
    with pytest.raises(exports.LinksRefusedError, match="refuses hard links"):
        hold(run, 7)
    before, file = find(saved(run)), exported(run, 7)
    reader.delete(saved(run))
    assert find(file).identity == before.identity


def test_a_whole_network_is_that_of_the_step_behind_an_export(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    file = exported(run, 7)
    assert targets.step_of(file).path == saved(run)
    hold(run, 7)
    reader.delete(saved(run))
    assert targets.step_of(file).step == 7
    release(run, 7)
    with pytest.raises(CheckpointError, match="step-00000007"):
        network.load(file)


def test_a_file_that_others_put_there(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    file = exported(run, 7)
    odd = file.with_name("step-00000008.safetensors")
    for name in (odd.name, "mine.safetensors"):
        shutil.copy(file, file.with_name(name))
        with pytest.raises(EvalError, match=f"{name} is not the encoder of a step of"):
            find(file.with_name(name))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "train")
    (run / "evals").write_text("")
    for keep in (hold, exported, release):
        with pytest.raises(CheckpointError, match=r"step 7 cannot be kept .*evals"):
            keep(run, 7)


# --- a part of a step


def two_files(run: Path, state: dict[str, Tensor]) -> Path:
    """A step of two ranks, of which the second wrote what is not the encoder's."""
    parts = []
    for rank, names in enumerate((sorted(state), ["optimizer.momentum"])):
        folder = run / f"rank{rank}"
        out = writer.Writer(folder, keep_last=1)
        values = state | {"optimizer.momentum": torch.ones(5)}
        out.save(5, {n: Piece(values[n].flatten(), 0, tuple(values[n].shape)) for n in names}, {})
        out.close()
        step = reader.folder_of(folder, 5)
        parts.append(reader.read_manifest(step / reader.MANIFEST))
        for file in step.glob("*.safetensors"):
            shutil.copy(file, run)
    whole = reader.merge(5, {}, parts)
    (run / reader.MANIFEST).write_bytes(writer.files.seal(whole.model_dump_json()))
    return run


def test_only_files_with_wanted_tensors_are_verified(tmp_path: Path) -> None:
    folder = two_files(tmp_path, {"method.backbone.w": torch.arange(4.0)})
    other = next(f for f in tmp_path.glob("*.safetensors") if b"optimizer" in f.read_bytes())
    raw = bytearray(other.read_bytes())
    raw[-1] ^= 1
    other.write_bytes(raw)

    with pytest.raises(CheckpointError, match="sha256"):
        reader.open_step(folder)
    part = reader.open_step(folder, "method.backbone.")
    assert part.names() == ["method.backbone.w"]
    assert torch.equal(part.read("method.backbone.w"), torch.arange(4.0))
    with pytest.raises(CheckpointError, match=r"optimizer\.momentum"):
        part.read("optimizer.momentum")
    other.unlink()
    reader.open_step(folder, "method.backbone.")


def test_a_step_and_its_export_share_their_results(tmp_path: Path) -> None:
    sets = [shards(tmp_path / name, [0, 1] * 4, seed) for seed, name in enumerate("ab")]
    run = run_folder(tmp_path, sets[0])
    wanted = Request(("knn",), train=str(sets[0]), test=str(sets[1]))
    (path,) = {
        Evaluation(target, wanted).path("knn")
        for target in (run, saved(run), hold(run, 7), exported(run, 7))
    }
    assert path.parent == run / "evals"
