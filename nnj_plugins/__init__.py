"""nnj's own plugins, each file an entry point without any privilege: layers, losses, quantities."""
