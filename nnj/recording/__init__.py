"""What extend() hangs on modules, and what a forward pass writes on the graph."""
