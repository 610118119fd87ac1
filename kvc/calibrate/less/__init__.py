"""The training of LESS's kernels.

A layer's activations are captured (`capture`), a policy is run over them (`policy`), the kernels of
that layer learn to answer for what it evicts (`loss`, `layer`), and so do those of all layers
(`training`).
"""
