"""A real SLURM cluster on this machine: munged, slurmctld and four slurmd, as this user, below one
folder.

with Cluster(Path("/some/folder")) as cluster:
    cluster.run("sinfo")
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
# Debian's default holds a requeued job for 120 s, notices a dead node after a minute and forgets
# finished jobs after five.
CONF = """
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5,socket={root}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
KillWait=3
SlurmdTimeout=10
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}]
NodeName=far1 NodeHostname=far1 NodeAddr=192.0.2.1 Port={port}
PartitionName=train Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=far Nodes=far1 MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Which of the programs are not installed."""
    paths = os.environ["PATH"] + ":/usr/sbin"
    return [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=paths)]


class Cluster:
    """Context: starts the daemons in `root`, which must be empty, and ends them with every job and
    process of theirs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        conf, port = self.root / "slurm.conf", _free_ports(5)
        conf.write_text(
            CONF.format(
                root=self.root, user=getpass.getuser(), port=port, first=port + 1, last=port + 4
            )
        )
        # a login node's environment: what an outer scheduler or torchrun has set would be taken for
        # the job's
        outer = ("SLURM", "SBATCH", "SQUEUE", "SUBMITIT", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        self.env |= {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin"}
        for folder in ("state", *(f"spool.n{i}" for i in range(1, 5))):
            (self.root / folder).mkdir()
        (self.root / "munge.key").write_bytes(os.urandom(1024))
        (self.root / "munge.key").chmod(0o600)
        files = [
            f"--{name}={self.root}/munge.{name[:-5]}"
            for name in ("key-file", "pid-file", "log-file", "seed-file")
        ]
        try:
            # --force: the folder of a test is closed to other users, who have no business here
            self._start(
                "munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *files
            )
            self._until(lambda: (self.root / "munge.socket").exists(), "munged does not come up")
            self._start("slurmctld", "-D", "-f", str(conf))
            for i in range(1, 5):
                self._start("slurmd", "-D", "-N", f"n{i}", "-f", str(conf))
            idle = "sinfo -h -N -p train -t idle -o %N"
            self._until(
                lambda: self.run(idle).split() == ["n1", "n2", "n3", "n4"],
                "the nodes do not become idle",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError, AssertionError):
            self.run(f"scancel -u {getpass.getuser()}")
            self._until(lambda: not self.run("squeue -h"), "jobs do not end", 10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        # also the steps, which outlive their slurmd, and what they start before they are dead
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

        for daemon in self._daemons:
            daemon.wait()

    def run(self, command: str) -> str:
        """Output of a command without quotes, e.g. 'squeue -h -t all'. Raises on a non-zero
        exit.
        """
        done = subprocess.run(
            command.split(), env=self.env, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """e.g. PENDING, RUNNING, COMPLETED, FAILED, CANCELLED."""
        return self.run(f"squeue -h -t all -o %T -j {job}").partition("\n")[0]

    def until(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until the job is in one of the states; which."""
        self._until(
            lambda: self.state(job) in states,
            f"job {job} does not become {' or '.join(states)}",
            seconds,
        )
        return self.state(job)

    def processes(self) -> list[int]:
        """Every process that this cluster or one of its jobs has started, by its environment."""
        mark, found = f"SLURM_CONF={self.root}/".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
        return found

    def _start(self, *command: str) -> None:
        with (self.root / f"{command[0]}.out").open("ab") as out:
            path = shutil.which(command[0], path=self.env["PATH"])
            self._daemons.append(
                subprocess.Popen(
                    [path or command[0], *command[1:]], env=self.env, stdout=out, stderr=out
                )
            )

    def _until(self, done: object, problem: str, seconds: float = 30) -> None:
        assert callable(done)
        limit = time.monotonic() + seconds
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                if done():
                    return
            if time.monotonic() > limit:
                logs = [
                    f"{p.name}: {p.read_text(errors='replace')[-800:]}"
                    for p in sorted(self.root.glob("*.log"))
                ]
                raise AssertionError("\n".join([problem, *logs]))
            # each question takes processor time from the jobs
            time.sleep(0.5)


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below the range that the kernel hands out to
    others.
    """
    for first in range(
        17000 + 64 * os.getpid() % 12000, 32000, count
    ):  # neighbours by number start at the same moment
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probe = stack.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
            return first
    raise AssertionError("no free ports")
