"""nnj.collect and nnj.fit: what is asked for, what one loss adds, and how results add up."""
