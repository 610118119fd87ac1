"""The bundled model: a small Llama that writes like a novel and recalls planted facts.

It exists so that every command of kvc runs out of the box, offline, on any machine, and so that
the damage a method does to recall can be measured without a download. README.md is its card;
`python -m kvc.demo.train` made it and `python -m kvc.demo.evaluate` measured it.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder of the bundled model, as `from_pretrained` and `mlx_lm.load` take it."""
    return Path(str(files(__name__)))
