"""Experiments and exercises that teach what the engine does, and what is true of common claims."""
