"""The only place with tolerances: (rtol, atol) by the type that sums are taken in."""

TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-5)}
