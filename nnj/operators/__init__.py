"""Curvature of a data set as matrix-free linear operators."""
