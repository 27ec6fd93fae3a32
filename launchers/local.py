"""Train on this machine with several processes: the command `scaletrain launch local`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("launch", "local")
