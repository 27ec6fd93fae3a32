"""Write shards from a CSV or Parquet listing of images: the command `scaletrain shards listing`."""

from scaletrain.cli.main import main

if __name__ == "__main__":
    main("shards", "listing")
