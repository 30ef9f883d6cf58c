"""The version of nnj, and the oldest torch that it was made for: imported first of all, since
torch's insides that nnj reads are not there, or something else, in older ones.
"""

import re

import torch

__version__ = "1.0.0"
OLDEST_TORCH = "2.6"  # as setup.cfg says; what .ci/run tests


def check_torch(found: str) -> None:
    """Errors: ImportError if a version of torch is too old."""
    if _numbers(found) < _numbers(OLDEST_TORCH):
        raise ImportError(
            f"nnj {__version__} needs torch {OLDEST_TORCH} or newer, and torch {found} is "
            "installed. Upgrade it from the index that it came from"
        )


def _numbers(version: str) -> list[int]:
    """The first two numbers."""
    return [int(n) for n in re.findall(r"\d+", version)[:2]]


check_torch(torch.__version__)
