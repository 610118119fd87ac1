"""`kvc push`: an artifact to the Hugging Face hub."""

from __future__ import annotations

import click

from kvc.cli.run import hush


@click.command()
@click.argument("file")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Of a repository that is not there yet.")
@click.option(
    "--base-model", metavar="ID", default="", help="The model's name on the hub, for the card."
)
def push(file: str, repo: str, private: bool, base_model: str) -> None:
    """Upload FILE, LESS kernels or a KVSharer map, to REPO on the Hugging Face hub.

    REPO is org/name, and is made if it is not there. A model card says what made FILE and how to
    use it. Log in first, with hf auth login, or set HF_TOKEN.

    Example: kvc push less.safetensors me/llama-less --base-model meta-llama/Llama-3.1-8B
    """
    from kvc import hub

    hush()
    click.echo(hub.push(file, repo, private=private, base_model=base_model))
