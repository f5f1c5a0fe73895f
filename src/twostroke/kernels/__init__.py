"""The op table and its backends. The forward pass in `models/` is written once against it."""
