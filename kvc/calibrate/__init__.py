"""What is learned once per model: `less`, the kernels of LESS; `kvsharer`, a map of layers."""
