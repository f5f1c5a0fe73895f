"""What an engine says of itself when it starts: the model, and every setting with its reason."""

from __future__ import annotations

from twostroke.cli.compose import BuiltEngine
from twostroke.cli.settings import format_bytes


def format_summary(built: BuiltEngine) -> str:
    """The model in one line, then one line for each setting: name, value, reason."""
    spec, info = built.parts.spec, built.parts.executor.describe()
    weights = format_count(spec.num_weights)
    lines = [
        f"{built.parts.model_name}: {spec.family}, {weights} weights in "
        f"{format_bytes(info.weight_bytes)}, context {spec.context_tokens:,} tokens; {info.backend}"
    ]
    choices = built.settings.choices
    names = max(len(choice.name) for choice in choices)
    values = max(len(choice.value) for choice in choices)
    lines += [
        f"  {choice.name:<{names}}  {choice.value:<{values}}  {choice.reason}" for choice in choices
    ]
    return "\n".join(lines)


def format_count(count: int) -> str:
    """A large count for people: three digits and K, M or B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
