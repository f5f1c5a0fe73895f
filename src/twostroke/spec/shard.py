"""Which part of a model one tensor-parallel rank holds.

Matrices are divided as Shoeybi et al. (2019, §3) do: q, k, v, gate and up by outputs, o and down by
inputs, whose partial sums the ranks then add up. Query heads go to the ranks in order, each with
the KV heads it reads: KV heads are divided where there are enough of them, else several ranks hold
the same one, which costs memory and no time. Every rank looks tokens up in the whole embedding; the
head is divided by rows of the vocabulary.

Owns arithmetic only: bytes are cut in `exec/cuda_weights.py`, layers divided in `spec/ranks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from twostroke.errors import DeviceError
from twostroke.spec.model import ModelSpec
from twostroke.spec.quant import Format

# Rows of the head that each rank's part is rounded up to: products want even sizes.
_HEAD_ROWS = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model; ranges are of the whole model's heads, rows and columns.

    spec: the model as this rank computes it: its heads, KV heads and columns of the FFN; where the
    head is divided it is no longer the embedding's matrix. head_rows: rows of every rank's part of
    the head, so that parts can be gathered; `vocab` is what of them is real, the rest is padding
    behind it. has_bias: True for the one rank that adds the biases of summed products.
    """

    rank: int
    world: int
    spec: ModelSpec
    heads: range
    kv_heads: range
    ffn: range
    vocab: range
    head_rows: int

    @property
    def has_bias(self) -> bool:
        """True for the rank that adds the biases of o and down: the others' are nothing."""
        return self.rank == 0

    def get_rows(self, weight: str) -> range:
        """Outputs of a weight that is divided by outputs: "q", "k", "v", "gate", "up", "head"."""
        size = self.spec.head_dim
        match weight:
            case "q":
                return range(self.heads.start * size, self.heads.stop * size)
            case "k" | "v":
                return range(self.kv_heads.start * size, self.kv_heads.stop * size)
            case "head":
                return self.vocab
            case _:
                assert weight in ("gate", "up"), weight
                return self.ffn

    def get_columns(self, weight: str) -> range:
        """Inputs of a weight that is divided by inputs: "o" or "down"."""
        if weight == "o":
            return self.get_rows("q")
        assert weight == "down", weight
        return self.ffn


def shard_spec(spec: ModelSpec, rank: int, world: int) -> Shard:
    """The part of `spec` that rank `rank` of `world` holds.

    Raises: DeviceError where heads or the FFN cannot be divided by `world`.
    """
    assert 0 <= rank < world
    heads = _divide(spec, "query heads", spec.num_heads, rank, world)
    ffn = _divide(spec, "columns of the FFN", spec.ffn_width, rank, world)
    kv_heads = _divide_kv_heads(spec, rank, world)
    rows = -(-spec.vocab_size // world)
    if world > 1:
        rows = -(-rows // _HEAD_ROWS) * _HEAD_ROWS
    first = min(rank * rows, spec.vocab_size)
    own = replace(
        spec,
        num_heads=len(heads),
        num_kv_heads=len(kv_heads),
        ffn_width=len(ffn),
        tied_embeddings=spec.tied_embeddings and world == 1,
        formats=spec.formats if world == 1 else _add_head(spec),
    )
    vocab = range(first, min(first + rows, spec.vocab_size))
    return Shard(rank, world, own, heads, kv_heads, ffn, vocab, rows)


def take_layers(spec: ModelSpec, layers: range) -> ModelSpec:
    """The model of these layers alone, counted from 0, as a pipeline stage computes it.

    Embedding, final norm and head stay in the description, whether the stage has them or not.
    """
    assert 0 <= layers.start < layers.stop <= spec.num_layers
    assert layers.step == 1
    formats = []
    for name, stored in spec.formats:
        head, _, rest = name.partition(".")
        index, _, short = rest.partition(".")
        if head != "layers":
            formats.append((name, stored))
        elif int(index) in layers:
            formats.append((f"layers.{int(index) - layers.start}.{short}", stored))
    own = spec.layers[layers.start : layers.stop]
    return replace(spec, layers=own, formats=tuple(formats))


def _add_head(spec: ModelSpec) -> tuple[tuple[str, Format], ...]:
    """The model's formats, with the embedding's for a head that was tied to it."""
    formats = dict(spec.formats)
    if "embed" in formats:
        formats.setdefault("head", formats["embed"])
    return tuple(formats.items())


def _divide(spec: ModelSpec, what: str, count: int, rank: int, world: int) -> range:
    if count % world:
        raise DeviceError(
            f"{spec.name} has {count} {what}, which {world} devices cannot share equally; "
            f"{_name_worlds(spec)}"
        )
    size = count // world
    return range(rank * size, (rank + 1) * size)


def _divide_kv_heads(spec: ModelSpec, rank: int, world: int) -> range:
    """The KV heads that the rank's query heads read, shared between ranks where there are few."""
    count = spec.num_kv_heads
    if count % world == 0 or world % count:
        return _divide(spec, "KV heads", count, rank, world)
    first = rank * count // world
    return range(first, first + 1)


def _name_worlds(spec: ModelSpec) -> str:
    """The numbers of devices that can share the model."""
    fits = [
        str(world)
        for world in range(1, min(spec.num_heads, 64) + 1)
        if spec.num_heads % world == 0
        and spec.ffn_width % world == 0
        and (spec.num_kv_heads % world == 0 or world % spec.num_kv_heads == 0)
    ]
    return f"it can be shared by {', '.join(fits)}"
