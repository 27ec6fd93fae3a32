"""Check every byte of a folder of shards: the command `scaletrain shards verify`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "verify")
