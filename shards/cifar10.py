"""Write shards from CIFAR-10: the command `scaletrain shards cifar10`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "cifar10")
