"""A function of modules and tensors as one graph: traced once for each case, guarded, replayed."""
