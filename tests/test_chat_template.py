"""From messages to tokens: the model's chat template, one of the user's, and their refusals."""

from pathlib import Path
from typing import Any

import pytest

from kvc import demo
from kvc.api import load_engine
from kvc.errors import ConfigError
from tests.run_cli import both, copied_model, need_backend

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'king' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "user", "content": "Who is Anna?"},
    {"role": "assistant", "content": "A girl."},
    {"role": "user", "content": "And Tom?"},
]
TEXT = "<s>[user] Who is Anna?\n[assistant] A girl.\n[user] And Tom?\n"


def plain_ids(engine: Any, text: str) -> list[int]:
    return list(engine.tokenizer.encode(text, add_special_tokens=False))


@both
def test_messages_become_tokens_by_the_template(backend: str, tmp_path: Path) -> None:
    need_backend(backend)
    model = copied_model(tmp_path)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    engine = load_engine(backend, str(model))
    assert engine.can_chat
    assert engine.encode(TALK) == plain_ids(engine, TEXT + "[assistant]")
    assert engine.encode(TALK, reply=False) == plain_ids(engine, TEXT)
    assert engine.encode("Who is Anna?") == plain_ids(engine, "<s>Who is Anna?")
    engine.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    assert engine.encode(TALK) == plain_ids(engine, "Who is Anna?|A girl.|And Tom?|")


@both
def test_a_template_in_place_of_none(backend: str) -> None:
    need_backend(backend)
    engine = load_engine(backend, str(demo.path()))
    assert not engine.can_chat
    with pytest.raises(ConfigError, match="expected a chat template"):
        engine.encode(TALK)
    engine.chat_template = TEMPLATE
    assert engine.can_chat
    assert engine.encode(TALK) == plain_ids(engine, TEXT + "[assistant]")
    for talk, why in (([{"role": "king", "content": "a"}], "no such role"), ([], "one message")):
        with pytest.raises(ConfigError, match=why) as error:
            engine.encode(talk)
        assert "\n" not in str(error.value)
    engine.chat_template = "{% for m in %}"
    with pytest.raises(ConfigError, match="refuses this conversation: TemplateSyntaxError"):
        engine.encode(TALK)
