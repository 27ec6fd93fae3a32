"""`python -m scaletrain` is the command `scaletrain`."""

from scaletrain.cli import main

main()
