"""What a profile of `kvc tune` says, in lines for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvc.cli.run import in_units

if TYPE_CHECKING:
    from kvc.calibrate.tune.fit import Fit


def profile_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """What `kvc info` says of a profile's method and of what was measured."""
    settings = " ".join(f"{key}={value}" for key, value in found["settings"].items())
    return {
        "method": found["method"],
        **({"settings": settings} if settings else {}),
        **measured_rows(found["measured"]),
    }


def measured_rows(measured: Mapping[str, Any]) -> dict[str, str]:
    """Bytes and quality, a line each."""
    quality = measured["quality"]
    return {
        "bytes": f"{in_units(measured['nbytes'])} for {measured['context']} tokens in "
        f"{measured['dtype_bytes']} bytes a number, {100 * measured['share']:.2f}% of the dense "
        f"cache; {measured['bytes_per_token']:.0f} a token and {in_units(measured['fixed_bytes'])}",
        "quality": f"divergence {quality['kl']:.2g} ± {quality['kl_error']:.1g} nats a token, "
        f"perplexity {quality['ppl']:.3f}, {100 * quality['ppl_increase']:+.2f}%",
    }


def front_lines(front: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is best at its bytes, a line each."""
    lines = ["best at their bytes, on one row:"]
    lines += [f"{'bytes':>7}  {'divergence':>10}  {'perplexity':>10}  method"]
    for point in front:
        settings = " ".join(
            f"{key.rpartition('.')[2]}={value}" for key, value in point["settings"].items()
        )
        lines.append(
            f"{100 * point['share']:>6.1f}%  {point['kl']:>10.2g}  "
            f"{100 * point['ppl_increase']:>+9.2f}%  {point['method']} {settings}".rstrip()
        )
    return lines


def fit_line(fit: Fit, context: int) -> str:
    """Whether a model with a context fits the memory, and what that rests on."""
    known = (
        f"a pass beside it {in_units(fit.beside)} (measured at {fit.lengths[0]} and "
        f"{fit.lengths[1]} tokens, taken to grow in a line)"
        if fit.beside is not None
        else "a pass beside it not known: no peak can be watched here"
    )
    verdict = "fits" if fit.fits else "does not fit"
    return (
        f"{in_units(fit.needed)} of {in_units(fit.memory)} at {context} tokens: {verdict}; "
        f"weights {in_units(fit.weights)}, cache {in_units(fit.cache)} (both measured), {known}"
    )
