"""Quantities: one file for each."""
