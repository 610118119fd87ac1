"""Caches as files: one library goes on where the other wrote, and files are as small as caches.

`python -m tests.cache_table` prints the figures of all methods on the bundled model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvc
import kvc.demo
from tests.backend_table import NAMES, PROMPT, engines, method_of
from tests.cache_table import compare
from tests.conftest import need
from tests.test_backends_agree import narrow

__all__ = ["narrow"]  # a fixture

BUNDLED = ("gear", "gear2", "token", "h2o", "less", "tova", "minicache+gear", "kvsharer+kivi")


@pytest.fixture(scope="module")
def bundled() -> list[Any]:
    """The bundled model on both libraries."""
    for library in ("torch", "mlx"):
        need(library)
    return engines(str(kvc.demo.path()))


@pytest.mark.parametrize("name", NAMES)
def test_the_other_library_goes_on(narrow: list[Any], name: str, tmp_path: Path) -> None:
    settings = {"gear.group_size": "8", "gear.buffer": "16"}
    method = method_of(name, narrow[0].shape, tmp_path, **settings)
    ids = narrow[0].encode(PROMPT[:400])
    for writer, reader in (narrow, narrow[::-1]):
        row = compare(writer, reader, method, ids, 20, tmp_path / "x.kvc")
        assert row.same == row.n, row


@pytest.mark.parametrize("name", BUNDLED)
def test_a_real_text_goes_on(bundled: list[Any], name: str, tmp_path: Path) -> None:
    method = method_of(name, bundled[0].shape, tmp_path)
    text = (kvc.demo.path() / "text.txt").read_text(encoding="utf-8")
    ids = bundled[0].encode(text)[:1000]
    for writer, reader in (bundled, bundled[::-1]):
        row = compare(writer, reader, method, ids, 64, tmp_path / "x.kvc")
        assert row.same == row.n, row
        assert 0 <= row.size - row.nbytes < 0.02 * row.nbytes, row
