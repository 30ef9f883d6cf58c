"""Autograd's graph as linear steps on many columns."""
