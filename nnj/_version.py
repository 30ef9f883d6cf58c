"""The version of nnj; a file of its own, so that the registry can read it without the rest."""

__version__ = "1.0.0"
