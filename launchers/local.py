"""Train on this machine with several processes:

    python launchers/local.py --procs 2 RECIPE [key=value ...] --run DIR
    python launchers/local.py --procs 2 doctor [...]

Everything but --procs, --port and --restarts is passed to `scaletrain train`, or to `scaletrain doctor`. The exit code is that
of the first process that failed; all others are ended with it, as they are when this launcher ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

ASKED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))  # ended because it was told to


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--procs", type=int, required=True, help="processes, each with a GPU of its own if there are any")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1, for the processes to meet; default: a free one")
    parser.add_argument(
        "--restarts", type=int, default=0, help="times to start again, from the last checkpoint, after a failure"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.procs < 1 or not 0 <= options.port < 65536:
        parser.error("--procs is at least 1 and --port below 65536")
    from scaletrain import dist  # slow to import, after the arguments are known good
    from scaletrain.tables import plural

    logging.disable()  # torch's agent logs every failure with a traceback of its own
    os.environ["SCALETRAIN_LAUNCHER"] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // options.procs)))
    for left in range(options.restarts, -1, -1):
        if options.port and (problem := dist.port_problem("127.0.0.1", options.port)):
            print(f"error: port {options.port} on 127.0.0.1: {problem}; choose another --port or leave it out", file=sys.stderr)
            return 2
        code = _attempt(options.procs, options.port, rest)
        if code in (0, 2, *ASKED) or not left:  # 2: the same input would be refused again
            return code
        print(f"starting again, {plural(left, 'restart')} left", file=sys.stderr)
    return code


def _attempt(procs: int, port: int, rest: list[str]) -> int:
    """Run all processes once; the exit code, after a line on stderr unless the failed process has said what was wrong."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    command = rest if rest[:1] == ["doctor"] else ["train", *rest]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=procs,
        run_id=uuid.uuid4().hex,
        rdzv_backend="static" if port else "c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0} if port else {},
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SCALETRAIN_ERROR_FILE"] = str(Path(folder) / "first-failure")
        try:
            elastic_launch(config, sys.executable)("-m", "scaletrain", *command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                print(f"process {rank} was ended by {_name(-failure.exitcode)}", file=sys.stderr)
                return 128 - failure.exitcode
            if failure.exitcode not in (2, 75, *ASKED):
                print(f"process {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
            return failure.exitcode
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _name(number: int) -> str:
    hint = ", which the system sends when memory runs out" if number == signal.SIGKILL else ""
    return signal.Signals(number).name + hint


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before any process was started
        sys.exit(130)
