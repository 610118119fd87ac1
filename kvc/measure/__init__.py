"""What methods cost, as measured."""
