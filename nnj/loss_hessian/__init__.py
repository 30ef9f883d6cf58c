"""The Hessian of a loss in its outputs, and its columns."""
