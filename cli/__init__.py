"""The command line: `kvc`."""

from typing import Any

import click

from kvc.cli.generate import generate
from kvc.cli.info import info
from kvc.errors import KVCError


class _Group(click.Group):
    """Errors of the user are one line and exit 2; Ctrl-C exits 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KVCError as error:
            click.echo(f"kvc: {str(error).removeprefix('kvc: ')}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("kvc: interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Group)
@click.version_option(package_name="kvc")
def main() -> None:
    """Generate text with a compressed KV cache.

    Example: kvc generate "It was a dark night" --method gear
    """


main.add_command(generate)
main.add_command(info)
