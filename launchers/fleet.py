"""Evaluate the checkpoints of runs while they train: the command `scaletrain launch fleet`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("launch", "fleet")
