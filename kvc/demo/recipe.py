"""How the bundled model is trained: its shape, its curriculum, its optimizers, one step.

Needs PyTorch 2.9 for its Muon.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvc.demo.data import Kind, Tokens


class Stage(NamedTuple):
    """A part of the curriculum."""

    until: float  # share of the run at which it ends
    context: int
    text: float  # share of the samples that are plain text
    max_gap: float  # largest mean number of book tokens between two planted facts


# Looking a number up by its name is learnt suddenly, and only where few facts stand close together:
# it did not appear in 300 steps at 256 tokens nor in 475 at 128 (with harder templates alone); at
# 64 it took 150 to 250. Distance comes afterwards.
CURRICULUM = (
    Stage(0.06, 64, 0.1, 1.5),
    Stage(0.12, 128, 0.2, 3),
    Stage(0.30, 256, 0.4, 10),
    Stage(0.50, 512, 0.5, 30),
    Stage(0.78, 1024, 0.5, 100),
    Stage(1.00, 2048, 0.5, 200),
)
WEIGHTS = {Kind.HIDDEN: 0.0, Kind.TEXT: 1.0, Kind.FRAME: 0.1, Kind.FIRST: 5.0, Kind.NEXT: 0.5}
WARMUP = 40  # steps
DECAY_FROM = 0.5  # share of the run after which the learning rate falls linearly
LR_END = 0.02  # of the learning rate at its height
# Nothing else bounds the logits of attention: without it they grew to a standard deviation of 10 to
# 90 for one query, where models of this kind that people use have 1 to 10.
NORM_WEIGHT = 0.1  # of what a head's queries and keys exceed their norm by


def new_model(
    tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int, mlp: int
) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    params = list(model.named_parameters())
    matrices = [p for name, p in params if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in params if p.ndim != 2 or "embed" in name]
    return {
        "muon": torch.optim.Muon(matrices, lr=lr, weight_decay=0.02),
        "adamw": torch.optim.AdamW(rest, lr=0.15 * lr, betas=(0.9, 0.95), weight_decay=0.0),
    }


def lr_factor(step: int, done: float) -> float:
    """The learning rate, relative to its height, at a step and a share of the run."""
    fall = min(1.0, (1 - done) / (1 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP) * max(LR_END, fall)


def train_step(
    model: LlamaForCausalLM,
    optimizers: dict[str, torch.optim.Optimizer],
    batch: tuple[Tokens, Tokens],
    factor: float,
    bf16: bool,
    max_norm: float,
) -> dict[str, float]:
    """One step of both optimizers; returns the loss on text and the shares of right digits.

    `max_norm` is what the norm of a head's query or key should not exceed; 0 sets no limit.
    """
    device = model.device
    x, kinds = (torch.from_numpy(a).long().to(device) for a in batch)
    weights = torch.tensor([WEIGHTS[k] for k in Kind], device=device)[kinds[:, 1:]]
    excess: list[torch.Tensor] = []
    hooks = _watch_norms(model, max_norm, excess) if max_norm else []
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        logits = model(input_ids=x[:, :-1]).logits
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), x[:, 1:].flatten(), reduction="none"
    ).view_as(weights)
    model.zero_grad()
    total = (loss * weights).sum() / weights.sum()
    torch.autograd.backward(total + NORM_WEIGHT * sum(excess))
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            if name == "adamw":  # Muon's updates have one size whatever the gradient's
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
        optimizer.step()
    right = (logits.detach().argmax(-1) == x[:, 1:]).float()
    text, first, following = (kinds[:, 1:] == k for k in (Kind.TEXT, Kind.FIRST, Kind.NEXT))
    return {
        "text": loss.detach()[text].mean().item(),
        "first": right[first].mean().item(),
        "next": right[following].mean().item(),
        "excess": float(sum(x.item() for x in excess)),
    }


def _watch_norms(
    model: LlamaForCausalLM, max_norm: float, excess: list[torch.Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Collects by how much squared norms exceed the limit's, relative to it: means by projection.

    RoPE turns queries and keys and leaves their norms.
    """
    head_dim = model.config.head_dim

    def collect(_: object, __: object, x: torch.Tensor) -> None:
        square = x.float().unflatten(-1, (-1, head_dim)).square().sum(-1)
        excess.append(torch.relu(square / max_norm**2 - 1).mean())

    layers = (layer.self_attn for layer in model.model.layers)
    projections = [p for a in layers for p in (a.q_proj, a.k_proj)]
    return [p.register_forward_hook(collect) for p in projections]
