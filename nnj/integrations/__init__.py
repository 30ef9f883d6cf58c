"""Packages of others that can run on nnj: each file needs the package that it is named for."""
