"""Columns backward and tangents forward through a graph: which sample each entry belongs to, in
what chunks columns go, where the last layer needs none, and whether autograd agrees.
"""
