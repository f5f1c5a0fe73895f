"""Rotary embedding settings of a config.json, in both spellings.

transformers 4 writes `rope_theta` and `rope_scaling`; transformers 5 nests both in
`rope_parameters`, for gemma3 once per kind of layer.
"""

from __future__ import annotations

from twostroke.spec.model import LinearScaling, Llama3Scaling, RopeScaling, RopeSpec
from twostroke.weights.json_values import JsonValues

_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    }
)
_DEFAULT_BASE = 10_000.0


def read_ropes(config: JsonValues, sliding_has_own: bool) -> tuple[RopeSpec, RopeSpec]:
    """Rope of the layers that see everything, and of those that see a window.

    sliding_has_own: sliding layers rotate by `rope_local_base_freq`, unscaled (gemma3).
    """
    base = config.get_positive("rope_theta", _DEFAULT_BASE)
    local = RopeSpec(config.get_positive("rope_local_base_freq", _DEFAULT_BASE))
    if not config.has("rope_parameters"):
        scaling = None
        if config.has("rope_scaling"):
            scaling = _read_scaling(config.get_object("rope_scaling"))
        full = RopeSpec(base, scaling)
        return full, local if sliding_has_own else full
    if config.has("rope_scaling"):
        config.refuse("rope_scaling", "and 'rope_parameters' are both given")
    parameters = config.get_object("rope_parameters")
    if parameters.has("full_attention") or parameters.has("sliding_attention"):
        full = _read_rope(parameters.get_object("full_attention"), base)
        return full, _read_rope(parameters.get_object("sliding_attention"), local.base)
    full = _read_rope(parameters, base)
    return full, local if sliding_has_own else full


def _read_rope(parameters: JsonValues, base: float) -> RopeSpec:
    return RopeSpec(parameters.get_positive("rope_theta", base), _read_scaling(parameters))


def _read_scaling(scaling: JsonValues) -> RopeScaling:
    """Scaling by name; other names than default, linear and llama3 are refused."""
    for key in scaling.values:
        if key not in _KEYS:
            scaling.refuse_unsupported(key, "is not understood; it may change the arithmetic")
    if scaling.get_positive("partial_rotary_factor", 1.0) != 1.0:
        scaling.refuse_unsupported("partial_rotary_factor", "is not 1, which is not supported")
    key = "type" if not scaling.has("rope_type") and scaling.has("type") else "rope_type"
    kind = scaling.get_text(key, "default")
    if kind not in ("default", "linear", "llama3"):
        scaling.refuse_unsupported(key, f"is '{kind}'; supported are default, linear and llama3")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(scaling.get_positive("factor"))
    return Llama3Scaling(
        factor=scaling.get_positive("factor"),
        low_freq_factor=scaling.get_positive("low_freq_factor"),
        high_freq_factor=scaling.get_positive("high_freq_factor"),
        original_context_tokens=scaling.get_size("original_max_position_embeddings"),
    )
