"""Write shards from a folder of images: the command `scaletrain shards folder`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "folder")
