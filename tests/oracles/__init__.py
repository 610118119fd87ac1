"""The independent truth: plain float64 loops, written from the papers, importing nothing of kvc.

One row of a batch at a time and without padding, because a row's result depends on neither.
Shapes are therefore [H, T, D]: key/value heads, tokens, channels. Query head j reads key/value
head j // (Hq // H).
"""
