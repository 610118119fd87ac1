"""Races of compressed caches against those of the library that runs the model, in one run."""
