"""Write shards from ImageNet: the command `scaletrain shards imagenet`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "imagenet")
