"""What the methods compute, as definitions that a kernel may stand in for."""
