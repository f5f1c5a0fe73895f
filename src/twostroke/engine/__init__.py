"""The running engine: loop, requests, metrics, and its offline and asynchronous faces."""
