"""Requests made from the server's own OpenAPI description: it fails at none of them."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

import kvc
from kvc.demo import path
from kvc.methods import parse
from kvc.serve.model import Served
from tests.run_cli import MODULES, need_backend
from tests.serve_fake import serving

EXAMPLES = 20  # of requests to each of the two that generate, right ones and as many wrong ones
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# What a description cannot say is refused: other models, too long prompts, texts without a token.
EXCLUDED = [positive_data_acceptance]


def short(case: Any) -> Any:
    """The same request for an answer of one token, if it asks for one."""
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(case.body, dict) and type(case.body.get(name, 16)) is int:
            most = case.body.get(name, 16)
            if name == "max_tokens" or name in case.body:
                case.body[name] = min(most, 1)
    return case


@pytest.mark.filterwarnings("ignore")  # those of the tools that make the requests
@pytest.mark.parametrize("backend", list(MODULES))
def test_nothing_that_is_asked_makes_it_fail(backend: str) -> None:
    need_backend(backend)

    def load() -> Served:
        engine = kvc.load_engine(backend, str(path()))
        engine.chat_template = TEMPLATE
        return Served(engine, parse("gear"), "exact", 512, 4)

    statuses: Counter[int] = Counter()
    with serving(load, name="bundled", max_tokens=1) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 6  # that of the description itself may be left out
        for operation, mode in product(operations, GenerationMode):
            if operation.method == "get" and mode is GenerationMode.NEGATIVE:
                continue  # there is nothing to get wrong

            @settings(
                max_examples=EXAMPLES if operation.method == "post" else 3,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                response = short(case).call()
                statuses[response.status_code] += 1
                case.validate_response(response, excluded_checks=EXCLUDED)

            ask()
        assert server.http.get("/health").status_code == 200
    assert statuses[200] > 20
    assert statuses[400] > 20
    assert max(statuses) < 500
