"""The cache: segments that each answer a query, and the store that joins their answers."""
