"""Facts: what a model, a weight format and a device are. Standard library only."""
