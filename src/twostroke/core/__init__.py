"""The scheduler as a pure state machine: no tensors, clock, randomness, logging or threads."""
