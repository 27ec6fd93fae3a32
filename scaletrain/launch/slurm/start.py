"""How a process of a SLURM job starts: signals are kept pending before anything slow is imported,
since one that came meanwhile would kill it.

python -m scaletrain.launch.slurm.start FOLDER      inside a job; FOLDER is that of the launch
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    _ASKED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)

    from scaletrain.launch.slurm import task

    task.main(Path(sys.argv[1]))
