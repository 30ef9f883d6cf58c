"""What curvature adds up to: symmetric positive semi-definite matrices over named parameters, which
multiply, solve, sample and meet factors.
"""

from nnj.matrices.block import BlockDiagonal, Part, Seen, joined
from nnj.matrices.diagonal import Diagonal
from nnj.matrices.kronecker import EigenKronecker, Kronecker
from nnj.matrices.load import load
from nnj.matrices.matrix import Dense, Matrix

__all__ = [
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Kronecker",
    "Matrix",
    "Part",
    "Seen",
    "joined",
    "load",
]
