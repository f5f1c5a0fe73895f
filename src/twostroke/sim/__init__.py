"""Workloads, traces, faults and clusters on a virtual clock; holds no scheduling code."""
