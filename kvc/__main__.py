"""`python -m kvc` is `kvc`."""

from kvc.cli import main

main(prog_name="kvc")
