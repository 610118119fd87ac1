"""The command line: `kvc`."""

import click

from kvc.cli.generate import generate
from kvc.cli.info import info


@click.group()
@click.version_option(package_name="kvc")
def main() -> None:
    """Generate text with a compressed KV cache."""


main.add_command(generate)
main.add_command(info)
