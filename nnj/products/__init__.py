"""The eight Jacobian products, without a loss."""
