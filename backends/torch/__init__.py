"""PyTorch and transformers: the primitives, the cache adapter and the engine."""
