"""Hypothesis profiles: `pytest tests/core --hypothesis-profile=fuzz` makes many more runs."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fuzz", max_examples=3000, deadline=None)
