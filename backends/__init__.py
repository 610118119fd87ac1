"""The libraries that kvc runs on: NumPy (definitions only), MLX and PyTorch."""
