"""Checkpoints of a training run, and the model folder that it ends in."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "checkpoint.safetensors"


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def save_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    optimizers: dict[str, torch.optim.Optimizer],
    rng: np.random.Generator,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Writes all that the next step depends on, in one file which is whole or not there."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for group, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{group}.{i}.{key}": value for key, value in state.items()}
    # The generator of the samples is the only one in use: the model has no dropout.
    header = {
        "rng": rng.bit_generator.state,
        "progress": asdict(progress),
        "settings": settings,
    }
    temporary = out / f"{NAME}.part"
    save_file(tensors, temporary, metadata={"run": json.dumps(header)})
    temporary.replace(out / NAME)


def load_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    optimizers: dict[str, torch.optim.Optimizer],
    rng: np.random.Generator,
    settings: dict[str, Any],
) -> Progress:
    """Puts model, optimizers and generator where the last checkpoint left them, if there is one.

    Raises:
        ValueError: if the checkpoint is of a run with other settings.
    """
    if not (out / NAME).exists():
        return Progress()
    with safe_open(out / NAME, framework="pt") as file:
        header = json.loads(file.metadata()["run"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if header["settings"] != settings:
        old, new = header["settings"], settings
        other = ", ".join(sorted(k for k in old | new if old.get(k) != new.get(k)))
        raise ValueError(f"{out / NAME} is of a run with another {other}; take another --out")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
    for group, optimizer in optimizers.items():
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{group}."):
                _, i, entry = key.split(".")
                state.setdefault(int(i), {})[entry] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    rng.bit_generator.state = header["rng"]
    return Progress(**header["progress"])


def export(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the model folder: weights in float16, configs, tokenizer."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    torch.nn.Module.half(half)  # the class's own `half` is not typed
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes rope_theta inside rope_parameters, mlx-lm reads it at the top level.
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
