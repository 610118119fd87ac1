"""The version of kvc, which its files name; a test holds it equal to that of pyproject.toml."""

__version__ = "0.1.0"
