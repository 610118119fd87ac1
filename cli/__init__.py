"""The command line: `kvc`."""

import os
import sys
from typing import Any

import click

from kvc.cli.bench import bench
from kvc.cli.cache import cache
from kvc.cli.chat import chat
from kvc.cli.eval import evaluate
from kvc.cli.generate import generate
from kvc.cli.info import info
from kvc.cli.lm_eval import lm_eval
from kvc.cli.push import push
from kvc.cli.search import search
from kvc.cli.serve import serve
from kvc.cli.train import train
from kvc.cli.tune import tune
from kvc.errors import KernelUnavailable, KVCError


class _Group(click.Group):
    """Errors of the user are one line and exit 2; Ctrl-C exits 130, a closed pipe 141."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KVCError, KernelUnavailable) as error:
            click.echo(f"kvc: {str(error).removeprefix('kvc: ')}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("kvc: interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # whoever read the output has enough, as `head` does
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # for Python's last flush
            ctx.exit(141)


@click.group(cls=_Group)
@click.version_option(package_name="kvc")
def main() -> None:
    """Generate text with a compressed KV cache.

    Example: kvc generate "It was a dark night" --method gear
    """


main.add_command(bench)
main.add_command(cache)
main.add_command(chat)
main.add_command(evaluate)
main.add_command(generate)
main.add_command(info)
main.add_command(lm_eval)
main.add_command(push)
main.add_command(search)
main.add_command(serve)
main.add_command(train)
main.add_command(tune)
