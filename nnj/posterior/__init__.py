"""A Gaussian over the parameters, from the curvature of a fit: its evidence, predictions, draws."""
