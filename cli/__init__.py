"""The command line: `kvc`."""

import click


@click.group()
@click.version_option(package_name="kvc")
def main() -> None:
    """Generate text with a compressed KV cache."""
