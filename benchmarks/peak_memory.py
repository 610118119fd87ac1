"""Peak memory of a long prompt, above the weights, for both ways to prefill.

`python -m benchmarks.peak_memory [N [BACKENDS [METHODS]]]` runs the bundled model's shape over N
random tokens (20000) with each backend (cpu,mlx), method and prefill, a process for each, and
prints JSON lines. The process's own
high-water mark is read on PyTorch's CPU, MLX's counter on MLX, CUDA's on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

METHODS = ("none", "kivi", "gear", "gear2", "minicache", "minicache+gear", "h2o")
STEP = 512  # tokens of the prompt at a time
NEW = 8


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    field = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def forget_peak() -> None:
    """Lets the high-water mark start again from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(backend: str, method: str, prefill: str, n: int) -> dict[str, Any]:
    """One row: what generating behind a prompt of `n` tokens held at most, and the cache."""
    import numpy as np

    import kvc.demo
    from kvc.api import load_engine
    from kvc.methods import parse
    from kvc.ops.dispatch import mode

    engine = load_engine(backend, str(kvc.demo.path()), "float32" if backend != "cuda" else None)
    settings = {}
    if method == "h2o":
        settings = {"heavy": "51", "recent": "51"}
    ids = np.random.default_rng(0).integers(3, 2000, n).tolist()
    run: dict[str, Any] = {"max_tokens": NEW, "temp": 0.0, "top_p": 1.0, "seed": 0}
    run |= {"prefill_step": STEP, "on_prefill": None}
    parsed = parse(method, settings)
    list(engine.stream(ids[:600], engine.make_cache(parsed, prefill), **run))  # warms up
    if backend == "mlx":
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
    elif backend == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        before = resident()
    cache = engine.make_cache(parsed, prefill)
    with mode("reference"):
        list(engine.stream(ids, cache, **run))
    peak = resident(peak=True) if backend == "cpu" else engine.peak_memory()
    report = engine.store(cache).report()
    packages = ("mlx", "mlx-lm") if backend == "mlx" else ("torch", "transformers")
    return {
        "versions": {package: version(package) for package in packages},
        "mode": "reference",
        "backend": backend,
        "method": method,
        "prefill": prefill,
        "tokens": n,
        "prefill_step": STEP,
        "peak_above_weights": peak - before,
        "cache_bytes": report.nbytes,
        "dense_bytes": report.dense_bytes,
    }


def main() -> None:
    """Prints a row for each combination that runs on this machine."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    backends = sys.argv[2].split(",") if len(sys.argv) > 2 else ["cpu", "mlx"]
    methods = sys.argv[3].split(",") if len(sys.argv) > 3 else METHODS
    for backend in backends:
        for method in methods:
            for prefill in ("exact", "stream"):
                code = (
                    "import json; from benchmarks.peak_memory import measure; "
                    f"print(json.dumps(measure({backend!r}, {method!r}, {prefill!r}, {n})))"
                )
                command = [sys.executable, "-W", "ignore", "-c", code]
                done = subprocess.run(command, capture_output=True, text=True)
                print(done.stdout.strip() or json.dumps({"error": done.stderr[-300:]}), flush=True)


if __name__ == "__main__":
    main()
