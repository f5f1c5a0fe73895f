"""Benchmarks: the engine, its peers and this machine's limits, measured in one interleaved run."""
