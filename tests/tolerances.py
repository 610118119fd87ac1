"""The only place with tolerances."""

# (rtol, atol) by the type that sums are taken in
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-5)}

# Largest difference of a logit between two backends in float32, whose logits reach 20. A coded
# cache amplifies the differences of its input, by the low-rank fit and by outliers, until a code
# falls on the other side of a tie; how far one such code moves a logit has no bound.
LOGITS = {"exact": 1e-4, "coded": 5e-4}

# Kernels: numbers that are stored in these types after sums in float32, (rtol, atol of the largest
# number); and how near to a half a code's place may be for it to be rounded to either side.
STORED = {"float16": (1e-3, 1e-3), "bfloat16": (8e-3, 8e-3), "float32": (1e-5, 2e-5)}
TIE = 1e-4

# Answers of kernels whose products are of numbers in these types: probabilities are rounded.
PRODUCTS = {"float32": (1e-5, 1e-5), "float16": (1e-3, 1e-3), "bfloat16": (8e-3, 8e-3)}

# Figures of an evaluation on two backends: three digits, of what is below 1 three decimals.
FIGURES = (1e-3, 1e-3)
