"""The native CPU backend: packed weights, and programs recorded through the op table."""
