"""Spellings of the end of a turn or of the text.

A model's files name one or two end tokens by key, yet a chat model may emit any of the others it
was trained with. Only tokens the vocabulary sets apart from text count.
"""

from __future__ import annotations

_TURN_ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<eos>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
    }
)


def is_turn_end(text: str, is_control: bool) -> bool:
    """True when a token set apart from text ends a turn.

    `</s>` does so only as a control token: it is an HTML tag too, and gemma's vocabulary has it
    as one, defined by the user but with no control meaning.
    """
    return text in _TURN_ENDS or (is_control and text == "</s>")
