"""The only place with tolerances."""

# (rtol, atol) by the type that sums are taken in
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-5)}

# Largest difference of a logit between two backends in float32, whose logits reach 20. A coded
# cache amplifies the differences of its input, by the low-rank fit and by outliers, until a code
# falls on the other side of a tie; how far one such code moves a logit has no bound.
LOGITS = {"exact": 1e-4, "coded": 5e-4}
