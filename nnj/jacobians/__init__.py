"""Jacobians of layers in one slot, factors B = V J at parameters, and the sample index."""
