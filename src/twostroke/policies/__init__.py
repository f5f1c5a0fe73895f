"""Choices by name: who goes first, how much a step takes, what is drafted, when KV is swapped."""
