"""Write shards from a data set of torchvision: the command `scaletrain shards from-torchvision`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "from-torchvision")
