"""The forward pass, written once against the op table."""
