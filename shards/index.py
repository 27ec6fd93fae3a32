"""Make the index of a folder of shards: the command `scaletrain shards index`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "index")
