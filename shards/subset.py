"""Write a label subset of a folder of shards: the command `scaletrain shards subset`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "subset")
