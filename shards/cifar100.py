"""Write shards from CIFAR-100: the command `scaletrain shards cifar100`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "cifar100")
