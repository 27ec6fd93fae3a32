"""The doctor's page and its local checks: what is found, what is told, and what must not be."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit.data import write_shards

from scaletrain import dist
from scaletrain.data.reading.reader import Shards
from scaletrain.doctor import disk, feed, machine, network, parity, software
from scaletrain.doctor import run as doctor
from scaletrain.doctor.page import Finding, lines
from scaletrain.launch.slurm import queue
from scaletrain.train import throughput_check

ROOT = Path(__file__).parents[3]


def said(findings: list[Finding]) -> str:
    return " | ".join(f"{f.status} {f.text}" for f in findings)


def test_slurm_variables_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_ACCOUNT", "secret-project")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    shown = lines(machine.slurm())
    assert "JOB_ACCOUNT JOB_ID" in shown
    assert not any(word in shown for word in ("4711", "secret", "WANDB", "hunter2"))


@pytest.mark.parametrize(
    ("own", "files", "cores", "gib"),
    [
        (
            "0::/a/b\n",
            {
                "a/b/cpu.max": "400000 100000",
                "a/cpu.max": "250000 100000",
                "a/memory.max": str(3 * 2**30),
            },
            2.5,
            3,
        ),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/b/memory.max": "max"}, None, None),
        (
            "4:memory:/j\n3:cpu,cpuacct:/j\n0::/\n",
            {
                "cpu/j/cpu.cfs_quota_us": "150000",
                "cpu/j/cpu.cfs_period_us": "100000",
                "memory/j/memory.limit_in_bytes": str(2**31),
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            1.5,  # the folder is named cpu,cpuacct and has a link `cpu`
            2,
        ),
        (
            "3:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
            None,
        ),
    ],
)
def test_limits_of_control_groups(
    own: str,
    files: dict[str, str],
    cores: float | None,
    gib: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.cpu_quota() == cores
    assert machine.memory_limit() == gib


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of this node share cores 0-3; another node's do not count."""
    everyone = [("here", [0, 1, 2, 3]), ("here", [0, 1, 2, 3]), ("there", [0, 1, 2, 3])]
    monkeypatch.setattr(dist, "gather_objects", lambda own: everyone)
    monkeypatch.setattr("platform.node", lambda: "here")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.cores_per_process() == 2
    assert [f.status for f in machine.cpus()] == ["ok"]
    everyone[1] = ("here", [4])  # bound apart: five cores for two
    assert machine.cores_per_process() == 2.5
    everyone[0] = ("here", [3])
    (found,) = machine.cpus()
    assert (found.status, "cpus-per-task" in found.fix) == ("warn", True)
    everyone[0] = ("here", [0, 1, 2, 3])
    monkeypatch.setattr(machine, "cpu_quota", lambda: 3.0)
    assert "throttled" in machine.cpus()[0].fix


def test_memory_shared_memory_and_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       33554432 kB\nMemFree:        1 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    assert machine.memory(8) == Finding("ok", "memory", "32.0 GiB in the machine")
    assert machine.memory(9).status == "warn"
    monkeypatch.setattr(machine, "memory_limit", lambda: 3.5)
    assert "limit of 3.5 GiB" in machine.memory(1).text
    assert machine.memory(1).status == "warn"

    blocks = SimpleNamespace(
        f_frsize=4096, f_blocks=16384, f_bavail=8192
    )  # docker's 64 MB, half of them taken
    monkeypatch.setattr(os, "statvfs", lambda _: blocks)
    assert machine.shared_memory(2).text == "0.03 of 0.06 GiB free, 0.25 needed by 2 processes"
    assert machine.shared_memory(2).status == "warn"
    assert machine.shared_memory(1).status == "ok"  # loader workers need none of it
    blocks.f_bavail = 2 * 2**18
    assert machine.shared_memory(16).status == "ok"
    assert machine.shared_memory(17).status == "warn"

    for soft, status in ((1023, "warn"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(
            resource, "getrlimit", lambda _, soft=soft: (soft, resource.RLIM_INFINITY)
        )
        assert machine.open_files().status == status


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [f.status for f in software.devices(False)] == ["ok"]
    (found,) = software.devices(True)
    assert (found.status, "--gres" in found.fix) == ("fail", True)
    assert parity.parity(torch.device("cpu")) == [Finding("skip", "GPU parity", "no GPU: not run")]
    cards = [("A100", 80, 8, 0), ("A100", 80, 8, 0), ("V100", 16, 7, 0)]
    facts = [
        SimpleNamespace(name=n, total_memory=g * 2**30, major=a, minor=b) for n, g, a, b in cards
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(facts))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: facts[i])
    assert [(f.status, f.text) for f in software.devices(True)] == [
        ("ok", "2 x A100, 80 GiB, capability 8.0, bf16"),
        ("warn", "1 x V100, 16 GiB, capability 7.0, no bf16"),
    ]


def test_wrong_numbers_of_a_gpu_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = dict.fromkeys(parity.CASES, 0.0)
    by_case = {case: name for name, (case, _) in parity.CASES.items()}
    monkeypatch.setattr(parity, "difference", lambda case, device: apart[by_case[case]])
    assert {f.status for f in parity.parity(torch.device("cuda"))} == {"ok"}
    apart["LARS, 3 steps"] = 2e-5
    apart["batch norm, bf16 against fp32"] = 0.01  # within what rounding explains
    assert [
        f.text.partition(":")[0] for f in parity.parity(torch.device("cuda")) if f.status == "fail"
    ] == ["LARS, 3 steps"]


def test_versions_name_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.status for f in software.versions()] == ["ok"] * 4
    assert f"torch {torch.__version__}".removeprefix("torch ") in said(software.versions())
    monkeypatch.setattr(software, "NEEDED", ("torchvision", "no-such-library"))
    assert said(software.versions()).endswith("fail not installed: no-such-library")


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards", (40, 40))
    content = sorted((p, p.stat().st_size) for p in tmp_path.rglob("*"))
    runs = tmp_path / "not" / "yet"
    assert "write and fsync" in said(disk.run_folder(runs))
    assert said(disk.shared(runs)) == "ok the same for all ranks"
    assert "reads/s per process" in said(disk.data_folder(shards))
    assert (
        sorted((p, p.stat().st_size) for p in tmp_path.rglob("*")) == content
    )  # nothing made, nothing left
    (found,) = disk.data_folder(tmp_path)
    assert (found.status, "no .tar files" in found.text, "--data" in found.fix) == (
        "fail",
        True,
        True,
    )

    monkeypatch.setattr(
        disk, "_write_and_read", lambda _: {"free": 9.0, "write": 49.0, "read": 1.0, "direct": True}
    )
    assert [f.status for f in disk.run_folder(runs)] == ["warn", "warn"]
    monkeypatch.setattr(
        disk, "_read_randomly", lambda _: {"rate": 99.0, "p95": 40.0, "direct": True}
    )
    assert [f.status for f in disk.data_folder(shards)] == ["warn"]


def test_filesystem_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.filesystem(Path("/proc/self")) == "proc"
    mounts = (
        "/dev/a / ext4",
        "server:/x /my\\040data nfs4",
        "b /my\\040data lustre",
        "c /my\\040data/run xfs",
        "d /tab\\011 zfs",
    )
    (tmp_path / "mounts").write_text("".join(f"{line} rw 0 0\n" for line in mounts))
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "mounts")
    folders = ("/my", "/my data/runs", "/my data/run/1", "/my data", "/tab\t/x")
    assert [disk.filesystem(Path(folder)) for folder in folders] == [
        "ext4",
        "lustre",
        "xfs",
        "lustre",
        "zfs",
    ]
    assert queue.filesystem is disk.filesystem


def test_random_reads_stay_inside_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.tar").write_bytes(b"x" * 5000)
    (tmp_path / "large.tar").write_bytes(bytes(3 * disk.READ + 17))
    (tmp_path / "other.bin").write_bytes(bytes(10 * disk.READ))
    got: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: got.append(real(*a)) or got[-1])
    numbers = disk._read_randomly(tmp_path)
    assert len(got) == disk.READS
    assert set(got) <= {5000, disk.READ}
    assert len(set(got)) == 2
    assert numbers["rate"] > 0


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk.tempfile, "NamedTemporaryFile", refuse)
    (found,) = disk.run_folder(tmp_path)
    assert (found.status, "--run" in found.fix) == ("fail", True)
    assert disk.shared(tmp_path) == []  # one line says it


def test_bandwidth_counts_the_whole_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 ms for everything: 1 MiB is 1.05 GB/s, of which each of four ranks gathers a quarter."""
    sizes: dict[str, list[int]] = {}

    def seconds(function: Any, size: int, times: int, device: torch.device) -> float:
        sizes.setdefault(function.__name__, []).append(size)
        return 1e-3

    monkeypatch.setattr(dist, "world", lambda: 4)
    monkeypatch.setattr(network, "_seconds", seconds)
    found = network.collectives(torch.device("cpu"))
    assert sizes["sum_nograd"] == [4096, 2**20, 2**24]
    assert sizes["gather_nograd"] == [1024, 2**18, 2**22]
    assert [f.text.partition(": ")[2] for f in found[:2]] == [
        "1 ms at 4 KiB; 1.05 GB/s at 1 MiB, 16.8 GB/s at 16 MiB"
    ] * 2
    monkeypatch.setattr(network, "_seconds", lambda *_: 1.0)
    assert [f.status for f in network.collectives(torch.device("cpu"))] == ["warn", "warn", "ok"]


def test_loader_and_the_cores_that_a_rehearsed_run_takes(tmp_path: Path) -> None:
    shards, run = write_shards(tmp_path / "shards", (40, 40)), tmp_path / "run"
    (found,) = feed.loader(shards, run)
    assert (found.status, "has no index" in found.text, "scaletrain shards index" in found.fix) == (
        "fail",
        True,
        True,
    )
    assert not (shards / "scaletrain-index.json").exists()
    Shards(shards).check()
    run.mkdir()
    (run / "config.yaml").write_text("data: {lanes: 8, views: [{size: 16, count: 3}]}\n")
    assert "3 views as in the run folder" in said(feed.loader(shards, run))
    (run / throughput_check.FILE).write_text(
        json.dumps({"loader_images_per_second": {"process": 1000, "node": 4000}})
    )
    for rate, status, cores in ((400.0, "ok", "2.5 cores"), (300.0, "warn", "3.3 cores")):
        (found,) = feed.needed(run, rate, 3)
        assert (found.status, cores in found.text) == (status, True)
    (run / throughput_check.FILE).write_text("{}")
    assert "fail KeyError" in said(feed.loader(shards, run))


def test_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat
    assert [f.status for f in network.clocks(tmp_path)] == ["ok"]
    monkeypatch.setattr(
        os, "fstat", lambda fd: SimpleNamespace(st_mtime=real(fd).st_mtime - 7, st_size=0)
    )
    with monkeypatch.context() as patch:
        patch.setattr(network, "existing", lambda _: tmp_path)
        (found,) = network.clocks(tmp_path)
    assert (found.status, "NTP" in found.fix) == ("warn", True)
    assert float(found.text.partition("worst: ")[2].split(" ms")[0]) == pytest.approx(
        -7000, abs=200
    )


def test_without_a_rendezvous_the_page_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: float) -> torch.device:
        raise dist.LaunchError("no rendezvous at node1:29500: timed out")

    monkeypatch.setattr(dist, "init", refuse)
    assert doctor.examine(tmp_path, None) == 1
    shown = capsys.readouterr().out
    assert "ok    python" in shown
    assert "fail  ranks        no rendezvous at node1:29500" in shown
    assert shown.endswith("1 failure\n")


def test_the_command(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", (40, 40))
    Shards(shards).check()
    command = [
        sys.executable,
        "-m",
        "scaletrain",
        "doctor",
        "--run",
        str(tmp_path / "run"),
        "--data",
        str(shards),
    ]
    bare = not torch.cuda.is_available()
    done = subprocess.run(
        [*command, "--require-gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (int(bare), "")
    page = done.stdout.splitlines()
    assert page[0].startswith("scaletrain doctor, ")
    assert page[-1].endswith(", 1 failure" if bare else ", 0 failures")
    names = (
        "torch",
        "devices",
        "CPU",
        "/dev/shm",
        "open files",
        "SLURM",
        "run folder",
        "data folder",
        "loader",
        "clocks",
    )
    for name in names:
        assert any(line[6:].startswith(name) for line in page), name
    assert not (tmp_path / "run").exists()
    if bare:
        assert "skip  GPU parity   no GPU: not run" in page
        assert "fail  devices      no GPU, and --require-gpu was given" in page
