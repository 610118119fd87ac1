"""The search for KVSharer's map: how far apart layers are, and how like states stay."""
