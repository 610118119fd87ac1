"""Recorded steps of decoding: what a CUDA graph replays gives what running each step gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the torch backend needs transformers")

import kvc.demo  # noqa: E402
from kvc.backends.torch.cache import make_cache  # noqa: E402
from kvc.backends.torch.engine import load  # noqa: E402
from kvc.backends.torch.graph import Steps, route, why_not  # noqa: E402
from kvc.errors import ConfigError  # noqa: E402
from kvc.methods import parse  # noqa: E402
from kvc.ops.dispatch import mode  # noqa: E402
from kvc.store import coded  # noqa: E402
from tests.recording import Recorder, Waits  # noqa: E402
from tests.triton_device import kernels, on_gpu  # noqa: E402

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("kivi", {}),
    ("kcvt", {}),
    ("token", {"bits": 2}),
    ("gear-l", {"rank": 2}),
    ("gear", {"outliers": 0.1}),
    ("gear2", {"sink": 4, "window": 8}),
    ("kvsharer+gear", {"kvsharer.map": "3:1"}),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return load(str(kvc.demo.path()), "cpu", None).model


N = 46  # tokens that are generated


def settings(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's own, and blocks so small that some are coded within a few steps."""
    small = {} if method in ("kcvt", "token") else {"group_size": 16}
    codec = {"buffer": 16, **small}
    return {**{f"gear.{k}" if "+" in method else k: v for k, v in codec.items()}, **given}


def cache_of(model: Any, method: str, given: dict[str, Any]) -> Any:
    return make_cache(model, parse(method, settings(method, given)))


def graphed(model: Any, cache: Any) -> Recorder:
    """Lets a cache's steps be recorded."""
    recorder = Recorder()
    cache.steps = Steps(cache, recorder)
    route(model)
    return recorder


def prompt(rows: int = 2) -> tuple[Any, Any]:
    ids = torch.randint(3, 500, (rows, 90), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def run(model: Any, cache: Any, ids: Any, mask: Any, n: int = N, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n, min_new_tokens=n,
            do_sample=False, return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip


def same(got: Any, want: Any) -> None:
    assert got.sequences.tolist() == want.sequences.tolist()
    for a, b in zip(got.logits, want.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("method", "given"), METHODS, ids=[name for name, _ in METHODS])
def test_replayed_steps_are_the_steps(model: Any, method: str, given: dict[str, Any]) -> None:
    ids, mask = prompt()
    want_cache, got_cache = (cache_of(model, method, given) for _ in range(2))
    want = run(model, want_cache, ids, mask)
    recorder = graphed(model, got_cache)
    got = run(model, got_cache, ids, mask)
    same(got, want)
    assert got_cache.get_seq_length() == want_cache.get_seq_length() == 89 + N
    for a, b in zip(got_cache.store.arrays(), want_cache.store.arrays(), strict=True):
        assert a.shape == b.shape
    # buffers grow for every block that is coded: then a step runs for itself, the next is recorded
    blocks = got_cache.store.units()[0].k.past.runs[-1].n
    assert blocks in (2, 3)
    assert len(recorder.recorded) in (blocks, blocks + 1)
    assert recorder.replayed == N - 2 - (blocks + 1)


def test_coding_into_the_same_buffers_keeps_the_recording(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coded, "GROWTH", 1)  # twice as large when full
    ids, mask = prompt(1)
    want = run(model, cache_of(model, "gear", {}), ids, mask, 65)
    cache = cache_of(model, "gear", {})
    recorder = graphed(model, cache)
    same(run(model, cache, ids, mask, 65), want)
    # the fourth block that is coded finds room
    assert [cache.store.units()[0].k.past.runs[-1].n, len(recorder.recorded)] == [4, 4]


@pytest.mark.parametrize("method", ["gear", "gear2"])
def test_padded_rows_go_by_clocks_of_their_own(model: Any, method: str) -> None:
    given = {"sink": 4, "window": 8} if method == "gear2" else {}
    ids, mask = prompt(3)
    mask[1, :23] = 0
    want = run(model, cache_of(model, method, given), ids, mask)
    cache = cache_of(model, method, given)
    recorder = graphed(model, cache)
    same(run(model, cache, ids, mask), want)
    assert len(cache.steps.clocks) == 2
    assert recorder.replayed >= 25


def test_a_conversation_goes_on(model: Any) -> None:
    """A second prompt, steps taken back, and a reset find the clocks right again."""
    ids, mask = prompt()

    def talk(cache: Any) -> list[Any]:
        said = [run(model, cache, ids, mask, 25)]
        cache.crop(-3)
        more = torch.cat([said[-1].sequences[:, :-4], ids[:, :20]], 1)
        said.append(run(model, cache, more, torch.ones_like(more), 25))
        cache.reset()
        said.append(run(model, cache, ids[:, :50], mask[:, :50], 25))
        return said

    want = talk(cache_of(model, "gear", {"window": 8}))
    cache = cache_of(model, "gear", {"window": 8})
    recorder = graphed(model, cache)
    for got, expected in zip(talk(cache), want, strict=True):
        same(got, expected)
    assert recorder.replayed >= 35


def test_beams_move_the_buffers_and_are_right(model: Any) -> None:
    ids, mask = prompt(1)
    options = {"num_beams": 3, "output_logits": False}

    def beams(cache: Any) -> Any:
        with torch.no_grad():
            return model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30,
                do_sample=False, **options,
            )  # fmt: skip

    want = beams(cache_of(model, "gear", {}))
    cache = cache_of(model, "gear", {})
    graphed(model, cache)
    assert beams(cache).tolist() == want.tolist()


def test_other_calls_of_the_model_run_as_ever(model: Any) -> None:
    ids, mask = prompt()
    cache = cache_of(model, "gear", {})
    recorder = graphed(model, cache)
    run(model, cache, ids, mask, 10)
    before = recorder.replayed
    with torch.no_grad():
        step = ids[:, :1]
        found = model(step, past_key_values=cache, output_hidden_states=True)
        assert found.hidden_states is not None
        assert isinstance(model(step, past_key_values=cache, return_dict=False), tuple)
        embeds = model.get_input_embeddings()(step)
        model(inputs_embeds=embeds, past_key_values=cache)
        assert recorder.replayed == before
        for _ in range(3):  # as it is recorded, recorded, replayed
            model(step, past_key_values=cache)
        assert recorder.replayed == before + 2
    plain = run(model, None, ids, mask, 5)  # the model without our cache
    assert plain.sequences.shape == (2, 95)


def test_a_copy_of_the_model_runs_itself(model: Any) -> None:
    route(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
        assert float(twin(prompt()[0]).logits.abs().max()) == 0


def test_what_waits_for_the_device_is_refused(model: Any) -> None:
    ids, mask = prompt()
    cache = cache_of(model, "gear", {})
    graphed(model, cache)

    def ask(module: Any, args: Any, out: Any) -> None:
        out[0].sum().item()

    hook = model.model.layers[0].register_forward_hook(ask)
    try:
        with pytest.raises(ConfigError, match="graph: this model's step cannot be recorded"):
            run(model, cache, ids, mask)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "a model on a CUDA GPU, got one on cpu"),
        ({"method": "h2o"}, "eviction and merging do not"),
        ({"method": "none"}, "a method that codes whole buffers"),
        ({"method": "minicache+gear"}, "eviction and merging do not"),
        ({"given": {"value_window": "sliding"}, "method": "kivi"}, "got a sliding window"),
        ({"mode": "dense"}, "whose layers all read the compressed cache"),
        ({"others": 3}, "whose layers all read the compressed cache"),
        ({"map": {"a": 0, "b": 1}}, "a model on one device"),
    ],
)
def test_what_has_no_recorded_steps_says_so(change: dict[str, Any], said: str) -> None:
    class On:
        device = torch.device("cuda" if change else "cpu")
        hf_device_map = change.get("map", {})

    method = parse(change.get("method", "gear"), change.get("given", {}))
    reason = why_not(On(), method, change.get("mode", "handle"), change.get("others", 0))
    assert reason is not None
    assert said in reason


def test_without_a_gpu_it_is_refused_before_any_work(model: Any) -> None:
    with pytest.raises(ConfigError, match="graph: expected a model on a CUDA GPU, got one on cpu"):
        make_cache(model, parse("gear"), graph=True)


SILENT = [
    "none", "kivi", "kcvt", "token", "gear-l", "gear-s", "gear", "gear2", "h2o", "tova",
    "streaming", "less", "minicache", "kvsharer", "kvsharer+gear", "minicache+gear", "h2o+token",
]  # fmt: skip


@pytest.mark.parametrize("method", SILENT)
def test_a_step_waits_for_nothing(model: Any, method: str) -> None:
    """Not even with a prompt's padding; MiniCache asks how many tokens it retained now and then."""
    ids, mask = prompt(3)
    mask[1, :23] = 0
    cache = make_cache(model, parse(method))
    run(model, cache, ids, mask, 4)
    with torch.no_grad(), Waits():
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.skipif(on_gpu(), reason="the interpreter's launches are recorded")
def test_kernels_are_replayed(model: Any) -> None:
    ids, mask = prompt(1)
    given = {"rank": 2, "n_iter": 1}
    want = run(model, cache_of(model, "gear-l", given), ids, mask, 7)
    cache = cache_of(model, "gear-l", given)
    recorder = graphed(model, cache)
    with kernels(), mode("fused"):
        got = run(model, cache, ids, mask, 7)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert recorder.replayed >= 3
    launched = [
        args for run_, args, _, _ in recorder.recorded[-1].noted if not hasattr(run_, "_schema")
    ]
    assert len(launched) >= 2 * model.config.num_hidden_layers  # codes, and the window
