"""Write shards from Fashion-MNIST: the command `scaletrain shards fashion-mnist`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "fashion-mnist")
