"""What is learned once per model: LESS's kernels and KVSharer's map."""
