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
from typing import Any

METHODS = ("none", "kivi", "gear", "gear2", "minicache", "minicache+gear", "h2o")
STEP = 512  # tokens of the prompt at a time
NEW = 8


def measure(backend: str, method: str, prefill: str, n: int) -> dict[str, Any]:
    """One row: what generating behind a prompt of `n` tokens held at most, and the cache."""
    import numpy as np

    import kvc.demo
    from kvc.api import load_engine
    from kvc.measure.peak import Peak
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
    peak = Peak(engine)
    cache = engine.make_cache(parsed, prefill)
    with mode("reference"):
        list(engine.stream(ids, cache, **run))
    above = peak.above()
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
        "peak_above_weights": above,
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
