"""`python -m scaletrain` is the command `scaletrain`."""

from scaletrain.cli.main import main

main()
