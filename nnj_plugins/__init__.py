"""nnj's own plugins: one file for each family of layers, each an entry point without any privilege."""
