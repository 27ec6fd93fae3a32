"""Train on a SLURM cluster: the command `scaletrain launch slurm`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("launch", "slurm")
