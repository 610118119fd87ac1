"""NumPy: the definitions in float64, against which the others are tested."""
