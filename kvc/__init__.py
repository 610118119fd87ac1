"""kvc: small KV caches for language models, on MLX and PyTorch."""
