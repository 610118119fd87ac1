"""Measurements that back the README's figures; `results/` keeps the rows."""
