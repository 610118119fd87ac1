"""An OpenAI-compatible server over compressed caches: `kvc serve`."""
