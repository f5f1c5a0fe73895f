"""A Vocabulary from the tokenizer files of a Hugging Face folder.

tokenizer.json does the tokenising; this module gathers what lies beside it: which ids begin and
end a text, which end a turn, and the chat template. Sources, the first that speaks wins:

    bos, eos        tokenizer_config.json by spelling, then config.json by id
    stop tokens     all ids of config.json and generation_config.json, and turn ends by spelling
    add_bos         tokenizer_config.json; what tokenizer.json itself adds, `text/` finds there
    chat template   chat_template.jinja, then tokenizer_config.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.vocabulary import Vocabulary, VocabularyKind
from twostroke.weights.json_file import read_json
from twostroke.weights.stop_tokens import is_turn_end


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Gather the vocabulary of a folder; ids must be below `vocab_size`.

    Raises: UnsupportedModel without a tokenizer.json, CorruptModel for files that contradict.
    """
    json_path = folder / "tokenizer.json"
    if not json_path.is_file():
        hint = "save it with AutoTokenizer(…, use_fast=True).save_pretrained"
        raise UnsupportedModel(f"{folder}: there is no tokenizer.json; {hint}")
    tokenizer = read_json(json_path)
    settings = _read_optional(folder / "tokenizer_config.json")
    added = _read_added_tokens(json_path, tokenizer)
    config_path = folder / "config.json"
    config = read_json(config_path)
    ends = _get_ids(config_path, config, "eos_token_id", vocab_size)
    generation_path = folder / "generation_config.json"
    generation = _read_optional(generation_path)
    stops = set(ends) | set(_get_ids(generation_path, generation, "eos_token_id", vocab_size))
    stops |= {token for text, token in added.items() if is_turn_end(text, is_control=True)}
    begins = _get_ids(config_path, config, "bos_token_id", vocab_size)
    bos = _find_token(settings, "bos_token", added, tokenizer, begins)
    eos = _find_token(settings, "eos_token", added, tokenizer, ends)
    return Vocabulary(
        kind=VocabularyKind.TOKENIZER_JSON,
        bos=bos,
        eos=eos,
        unknown=_find_token(settings, "unk_token", added, tokenizer, []),
        padding=_find_token(settings, "pad_token", added, tokenizer, []),
        stop_tokens=frozenset(stops if eos is None else stops | {eos}),
        add_bos=bos is not None and settings.get("add_bos_token") is True,
        add_eos=eos is not None and settings.get("add_eos_token") is True,
        chat_template=_read_template(folder, settings),
        json_path=json_path,
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _get_ids(path: Path, config: dict[str, Any], key: str, vocab_size: int) -> list[int]:
    """Token ids of a key that may be absent, one id, or a list; gemma3 nests them."""
    value = config.get(key)
    nested = config.get("text_config")
    if value is None and isinstance(nested, dict):
        value = nested.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not whole or not 0 <= token < vocab_size:
            raise CorruptModel(f"{path}: key '{key}' has {token!r}, no id below {vocab_size}")
    return ids


def _read_added_tokens(path: Path, tokenizer: dict[str, Any]) -> dict[str, int]:
    """Ids of the tokens that tokenizer.json sets apart from text, by spelling."""
    added = {}
    for each in tokenizer.get("added_tokens") or []:
        token = each.get("id") if isinstance(each, dict) else None
        text = each.get("content") if isinstance(each, dict) else None
        if not isinstance(token, int) or not isinstance(text, str):
            raise CorruptModel(f"{path}: 'added_tokens' has {each!r}")
        if each.get("special"):
            added[text] = token
    return added


def _find_token(
    settings: dict[str, Any],
    key: str,
    added: dict[str, int],
    tokenizer: dict[str, Any],
    fallback: list[int],
) -> int | None:
    """The id of a token that tokenizer_config.json spells, else the first of `fallback`."""
    spelled = settings.get(key)
    text = spelled.get("content") if isinstance(spelled, dict) else spelled
    if isinstance(text, str):
        model = tokenizer.get("model")
        table = model.get("vocab") if isinstance(model, dict) else None
        token = added.get(text, table.get(text) if isinstance(table, dict) else None)
        if isinstance(token, int):
            return token
    return fallback[0] if fallback else None


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template; of several named ones, the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorruptModel(f"{path}: not UTF-8: {error.reason}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {
            each.get("name"): each.get("template") for each in template if isinstance(each, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None
