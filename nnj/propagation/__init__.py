"""Columns backward and tangents forward through a graph: whose the entries are, in what chunks,
from which layer on.
"""
