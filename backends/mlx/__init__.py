"""MLX and mlx-lm: Apple silicon through Metal shaders, and the CPU."""
