"""Executors: they turn a step plan into an outcome and keep KV bytes, nothing else."""
