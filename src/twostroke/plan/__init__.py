"""Predicted times and sizes: what a step, a model on a device, and a deployment would take."""
