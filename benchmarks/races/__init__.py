"""Races on one device in one run: kernels, decode steps, generation, memory, encoding, growth."""
