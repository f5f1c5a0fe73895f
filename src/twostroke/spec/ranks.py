"""How the ranks of one model are numbered, and which layers each pipeline stage holds.

A rank is one process with one device. Tensor parallelism divides every matrix over the ranks of a
stage, pipeline parallelism divides the layers over stages; rank = stage * tensor + shard. Owns
arithmetic only: which slice of a weight a rank holds is in `spec/shard.py`, how ranks talk in
`kernels/cuda/collectives.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from twostroke.errors import DeviceError
from twostroke.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class RankLayout:
    """So many ranks a stage (`tensor`) and so many stages (`stages`), each 1 or more."""

    tensor: int = 1
    stages: int = 1

    def __post_init__(self) -> None:
        assert self.tensor >= 1
        assert self.stages >= 1

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tensor * self.stages

    @property
    def sampling_rank(self) -> int:
        """The rank that draws tokens: the first of the last stage."""
        return (self.stages - 1) * self.tensor

    @property
    def token_ranks(self) -> tuple[int, ...]:
        """Ranks that know drawn tokens: the one that draws, and the first stage, which embeds."""
        return tuple(sorted({self.sampling_rank, *range(self.tensor)}))

    def get_rank(self, stage: int, shard: int) -> int:
        """The rank of a shard of a stage."""
        assert 0 <= stage < self.stages
        assert 0 <= shard < self.tensor
        return stage * self.tensor + shard


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank within its layout."""

    rank: int
    layout: RankLayout

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.layout.world

    @property
    def stage(self) -> int:
        """Which pipeline stage it belongs to."""
        return self.rank // self.layout.tensor

    @property
    def shard(self) -> int:
        """Which part of its stage's matrices it holds."""
        return self.rank % self.layout.tensor

    @property
    def is_first_stage(self) -> bool:
        """True when it embeds tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """True when it computes logits."""
        return self.stage == self.layout.stages - 1

    @property
    def is_sampling(self) -> bool:
        """True for the one rank that draws tokens."""
        return self.rank == self.layout.sampling_rank


WHOLE = RankPlace(0, RankLayout())


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage's part of a model.

    spec: the model as if it had only the stage's `layers`, which are of the whole model. It still
    names an embedding and a head; what the stage needs of them `holds` tells.
    """

    place: RankPlace
    layers: range
    spec: ModelSpec

    def holds(self, name: str) -> bool:
        """Whether the stage needs a tensor of `spec`."""
        match name.partition(".")[0]:
            case "embed":
                tied = self.spec.tied_embeddings and self.place.is_last_stage
                return self.place.is_first_stage or tied
            case "head" | "final_norm":
                return self.place.is_last_stage
            case _:
                return True

    def get_whole_name(self, name: str) -> str:
        """The whole model's name of a tensor of `spec`."""
        head, _, rest = name.partition(".")
        if head != "layers":
            return name
        index, _, rest = rest.partition(".")
        return f"layers.{self.layers[int(index)]}.{rest}"


def cut_stage(spec: ModelSpec, place: RankPlace) -> Stage:
    """The stage of `spec` that a rank belongs to. Raises DeviceError as `split_layers` does."""
    layers = split_layers(spec, place.layout.stages)[place.stage]
    if len(layers) == spec.num_layers:
        return Stage(place, layers, spec)
    cut = replace(spec, layers=spec.layers[layers.start : layers.stop], formats=())
    stage = Stage(place, layers, cut)
    formats = dict(spec.formats)
    kept = [
        (tensor.name, formats[stage.get_whole_name(tensor.name)])
        for tensor in cut.tensors()
        if stage.get_whole_name(tensor.name) in formats
    ]
    return replace(stage, spec=replace(cut, formats=tuple(kept)))


def split_layers(spec: ModelSpec, stages: int) -> tuple[range, ...]:
    """The layers of each pipeline stage, in order, so that the largest stage is the smallest it
    can be, in weight bytes.

    The first stage's embedding and the last one's final norm and head are counted with them; a tied
    embedding is held, and counted, by both. Among equal splits the earlier stages hold more layers.
    Raises: DeviceError when there are more stages than layers.
    """
    assert stages >= 1
    if stages > spec.num_layers:
        raise DeviceError(
            f"{spec.name} has {spec.num_layers} layers: it cannot be divided into {stages} stages"
        )
    layer_bytes, first_bytes, last_bytes = _count_bytes(spec)
    if stages == 1:
        return (range(spec.num_layers),)
    # What can end a stage is a layer; so the limit is one of few sums, and bisecting over bytes
    # finds it exactly.
    low, high = 0, sum(layer_bytes) + first_bytes + last_bytes
    while low < high:
        limit = (low + high) // 2
        if _fill(layer_bytes, (first_bytes, last_bytes), stages, limit) is None:
            low = limit + 1
        else:
            high = limit
    ends = _fill(layer_bytes, (first_bytes, last_bytes), stages, low)
    assert ends is not None
    return tuple(map(range, (0, *ends[:-1]), ends))


def _count_bytes(spec: ModelSpec) -> tuple[list[int], int, int]:
    """Weight bytes of every layer, of what precedes them and of what follows them."""
    layers = [0] * spec.num_layers
    first = last = 0
    for tensor in spec.tensors():
        head, _, rest = tensor.name.partition(".")
        if head == "layers":
            layers[int(rest.partition(".")[0])] += tensor.bytes
        elif head == "embed":
            first += tensor.bytes
            last += tensor.bytes if spec.tied_embeddings else 0
        else:
            last += tensor.bytes
    return layers, first, last


def _fill(
    layer_bytes: Sequence[int], ends_bytes: tuple[int, int], stages: int, limit: int
) -> tuple[int, ...] | None:
    """The last layer + 1 of each stage, filled from the front up to `limit` bytes, or None.

    Every stage gets a layer, so one stops early where those behind it would have none. What the
    last stage holds besides layers is weighed as if it were a layer that cannot be alone.
    """
    first, last = ends_bytes
    ends: list[int] = []
    at = 0
    for stage in range(stages):
        left = stages - stage - 1
        held = first if stage == 0 else 0
        held += last if left == 0 else 0
        begin, stop = at, len(layer_bytes) - left
        while at < stop and held + layer_bytes[at] <= limit:
            held += layer_bytes[at]
            at += 1
        if at == begin:
            return None
        ends.append(at)
    return tuple(ends) if at == len(layer_bytes) else None
