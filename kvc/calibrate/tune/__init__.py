"""Tuning: the method, its parameters and the bits of each layer that suit one model best."""
