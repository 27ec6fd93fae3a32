"""What the operating system and the scheduler allow this process: cores, memory, shared memory,
open files.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from scaletrain import dist
from scaletrain.data.reading.reader import OPEN_SHARDS
from scaletrain.doctor.page import Finding, limit
from scaletrain.runtime.tables import plural

GIB = 2**30
# GiB per process where a node has several: the buffers of NCCL
SHM_NEED = 0.125
# GiB per process, for torch, a ResNet-50 and the loader workers
MEMORY_NEED = 4.0
# shards, and what pipes, sockets and libraries open
FILES_NEED = 2 * OPEN_SHARDS + 512
SHM = Path("/dev/shm")
CGROUP, OWN_GROUPS, MEMINFO = (
    Path("/sys/fs/cgroup"),
    Path("/proc/self/cgroup"),
    Path("/proc/meminfo"),
)


def limits() -> list[Finding]:
    """Memory, shared memory, open files, and whether this is a SLURM job."""
    local = dist.local_world()
    return [memory(local), shared_memory(local), open_files(), *slurm()]


def cpus() -> list[Finding]:
    """Cores by affinity, and the quota of the control group. Every rank calls it."""
    allowed, quota, each = len(os.sched_getaffinity(0)), cpu_quota(), cores_per_process()
    text = f"{allowed} of {os.cpu_count()} cores by affinity" + (
        f", cgroup quota of {quota:g}" if quota else ""
    )
    text += f"; {each:g} per process" if each != allowed else ""

    if quota and quota < allowed:
        return [
            Finding(
                "warn",
                "CPU",
                text,
                "threads are throttled: bind no more cores than the quota, or raise it",
            )
        ]

    fix = (
        "one core trains and loads: ask for more (SLURM: --cpus-per-task), start fewer "
        "processes, or set data.workers=0"
    )
    return [limit(each < 2, "CPU", text, fix)]


def cores_per_process() -> float:
    """Of this node, whose processes have cores of their own (SLURM's tasks) or share them
    (torchrun). Every rank calls it.
    """
    node = platform.node()
    sets = [
        set(cores)
        for place, cores in dist.gather_objects((node, sorted(os.sched_getaffinity(0))))
        if place == node
    ]

    return len(set[int]().union(*sets)) / len(sets)


def cpu_quota() -> float | None:
    """Cores that the tightest control group grants, None without a limit."""
    found = []
    for folder in _groups("cpu"):
        pair = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]

        # "max" or -1: no limit
        if len(pair) == 2 and pair[0].isdecimal():
            found.append(int(pair[0]) / int(pair[1]))

    return min(found, default=None)


def memory(local: int) -> Finding:
    facts = dict(line.split()[:2] for line in MEMINFO.read_text().splitlines())
    total = int(facts["MemTotal:"]) / 2**20
    found = memory_limit()
    text = f"{total:.1f} GiB in the machine" + (
        f", limit of {found:.1f} GiB (cgroup)" if found and found < total else ""
    )
    need = MEMORY_NEED * local
    whose = plural(local, "process")
    fix = (
        f"{need:g} GiB are advised for {whose}: ask for more (SLURM: --mem), or lower batch and "
        "data.workers"
    )

    return limit(min(total, found or total) < need, "memory", text, fix)


def memory_limit() -> float | None:
    """GiB that the tightest control group grants, None without a limit."""
    values = [
        w
        for f in _groups("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        for w in _words(f / name)
    ]
    found = [int(value) / GIB for value in values if value.isdecimal()]

    # version 1 writes 2^63 for none
    return min((value for value in found if value < 2**30), default=None)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and those above it, version 2's and `controller`'s of
    version 1.
    """
    for line in OWN_GROUPS.read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue

        roots = (CGROUP, CGROUP / "unified") if not names else (CGROUP / controller,)
        inside = Path(path.lstrip("/"))
        for root in roots:
            yield from (root / part for part in (inside, *inside.parents))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def shared_memory(local: int) -> Finding:
    """NCCL passes through it what the processes of a node send each other. Loader workers do not
    need it.
    """
    need = SHM_NEED * local if local > 1 else 0.0

    try:
        facts = os.statvfs(SHM)
    except OSError as error:
        return Finding("fail", str(SHM), f"{error.strerror}", "mount it (docker: --ipc=host)")

    size, free = (blocks * facts.f_frsize / GIB for blocks in (facts.f_blocks, facts.f_bavail))
    if free >= need:
        return Finding("ok", str(SHM), f"{size:.1f} GiB")

    fix = "docker: --shm-size or --ipc=host; remove what dead processes left there"
    text = f"{free:.2f} of {size:.2f} GiB free, {need:g} needed by {plural(local, 'process')}"
    return Finding("warn", str(SHM), text, fix)


def open_files() -> Finding:
    soft, hard = (
        "unlimited" if v == resource.RLIM_INFINITY else v
        for v in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    low = not isinstance(soft, str) and soft < FILES_NEED

    return limit(
        low,
        "open files",
        f"{soft}, at most {hard}; {FILES_NEED} needed",
        f"ulimit -n {FILES_NEED} before the start",
    )


def slurm() -> list[Finding]:
    """Inside a job, the names of SLURM's variables: which are set explains most launch problems;
    values may be private.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return [Finding("ok", "SLURM", "not inside a job")]

    names = sorted(name.removeprefix("SLURM_") for name in os.environ if name.startswith("SLURM_"))
    return [Finding("ok", "SLURM", f"inside a job; set, after SLURM_: {' '.join(names)}")]
