"""Tokens one by one out of transformers' own generation loop, which runs to its end."""

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvc.backends.sequences import Piece
from kvc.backends.text import Text
from kvc.backends.torch.attention import decoder_of
from kvc.backends.torch.entry import KVCCache

OnPrefill = Callable[[int, int], None]


def stream(
    model: PreTrainedModel,
    ids: Sequence[int],
    cache: KVCCache,
    config: GenerationConfig,
    text: Text,
    on_prefill: OnPrefill | None,
) -> Iterator[Piece]:
    """Generates from `ids`, which come after the tokens in the cache.

    Generation runs in a thread of its own, never ahead of the reader. Its errors are raised here,
    and closing this iterator (as Ctrl-C does) stops it before the next forward pass.
    """
    held = cache.get_seq_length()
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop, wanted = threading.Event(), threading.Semaphore(0)

    def on_token(token: int) -> None:
        events.put(("token", token))
        wanted.acquire()  # else a closed iterator would leave tokens that nobody has seen
        if stop.is_set():
            raise _Stopped

    def after_forward(*_: Any) -> None:
        if stop.is_set():
            raise _Stopped
        events.put(("prefill", min(cache.get_seq_length() - held, len(ids))))

    @torch.no_grad()
    def read_pieces(inputs: torch.Tensor) -> torch.Tensor:
        # transformers 5.17 takes pieces for the first tokens of the cache
        *pieces, last = inputs.split(config.prefill_chunk_size or inputs.shape[1], 1)
        config.prefill_chunk_size = None
        for piece in pieces:
            decoder_of(model)(piece, past_key_values=cache, use_cache=True)
            after_forward()
        return last

    def work() -> None:
        hook = model.register_forward_hook(after_forward)
        try:
            if stop.is_set():  # between the thread's birth and here
                return
            inputs = torch.tensor([list(ids)], device=model.device)
            if held:
                inputs = read_pieces(inputs)
            model.generate(
                inputs,
                attention_mask=inputs.new_ones(1, held + len(ids)),  # the cache's tokens too
                past_key_values=cache,
                generation_config=config,
                streamer=_Tokens(on_token),
            )
            events.put(("end", None))
        except _Stopped:
            pass
        except BaseException as error:  # raised again in the caller's thread
            events.put(("error", error))
        finally:
            hook.remove()

    # The thread sees the caller's context variables, such as the choice of kernels.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(work,), daemon=True)
    n_prefilled = 0
    try:
        thread.start()
        while True:
            kind, value = events.get()
            if kind == "token":
                yield Piece(text.add(value), value)
                wanted.release()
            elif kind == "error":
                raise value
            elif kind == "end":
                return
            elif on_prefill is not None and value > n_prefilled:
                n_prefilled = value
                on_prefill(value, len(ids))
    finally:
        stop.set()
        wanted.release()
        with suppress(RuntimeError):  # Ctrl-C came before it was born
            thread.join()


class _Stopped(Exception):  # noqa: N818 - not an error
    pass


class _Tokens(BaseStreamer):
    """Hands on the new tokens; the first thing `generate` sends is the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.is_prompt = on_token, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in value.reshape(-1).tolist():
                self.on_token(token)
        self.is_prompt = False

    def end(self) -> None:
        pass
