"""A codec that decodes wrongly, which everything that measures quality must notice."""

from typing import Any

import pytest

from kvc.store import coded


def break_codec(monkeypatch: pytest.MonkeyPatch, factor: float = 1.5) -> None:
    """Every step between codes is so many times what it should be."""
    encode = coded.encode

    def wrong(*args: Any, **kwargs: Any) -> Any:
        code = encode(*args, **kwargs)
        return code._replace(d=code.d._replace(step=code.d.step * factor))

    monkeypatch.setattr(coded, "encode", wrong)
