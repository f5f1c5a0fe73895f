"""The two models we ship names for: every byte accounted for, every tensor where it should be."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from places import get_model_path
from twostroke.kernels.reference.dequant import dequantise
from twostroke.spec.vocabulary import TokenType, VocabularyKind
from twostroke.weights.gguf import ArrayValue, GGUFFile, ValueType, read_gguf
from twostroke.weights.load import open_model

pytestmark = pytest.mark.real_model

MODELS = ["smollm2-135m", "gemma3-270m"]


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest) -> tuple[GGUFFile, gguf.GGUFReader]:
    """One model as we read it and as the gguf package does, which takes seconds."""
    path = get_model_path(request.param)
    return read_gguf(path), gguf.GGUFReader(path)


@pytest.mark.parametrize(
    ("name", "num_weights", "tensor_bytes"),
    [("smollm2-135m", 134_515_008, 96_576_768), ("gemma3-270m", 268_098_176, 246_587_904)],
)
def test_summed_tensors_are_the_files_bytes(name: str, num_weights: int, tensor_bytes: int) -> None:
    path = get_model_path(name)
    file = read_gguf(path)
    with open_model(path) as model:
        assert model.spec.num_weights == num_weights
        assert model.spec.weight_bytes == file.tensor_bytes == tensor_bytes
        assert model.unused_bytes == 0
        first = min(tensor.offset for tensor in file.tensors.values())
        aligned = sum(-(-tensor.bytes // 32) * 32 for tensor in file.tensors.values())
        assert first + aligned == model.file_bytes == path.stat().st_size


def test_metadata_is_what_the_gguf_package_reads(
    both: tuple[GGUFFile, gguf.GGUFReader],
) -> None:
    file, theirs = both
    for key, entry in file.entries.items():
        expected = theirs.fields[key].contents()
        if not isinstance(entry.value, ArrayValue):
            assert entry.value == expected, key
        elif entry.value.element is ValueType.STRING:
            assert file.get_strings(entry.value, key) == expected, key
        else:
            assert file.get_numbers(entry.value).tolist() == expected, key
    assert len(file.entries) == len(theirs.fields) - 3  # theirs counts the header as fields


def test_one_tensor_of_each_format_decodes_as_the_gguf_package_decodes_it(
    both: tuple[GGUFFile, gguf.GGUFReader],
) -> None:
    file, reader = both
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    seen = set()
    for info in sorted(file.tensors.values(), key=lambda tensor: tensor.bytes):
        if info.format in seen or len(info.shape) == 1:
            continue
        seen.add(info.format)
        tensor = theirs[info.name]
        rows = slice(0, 512)
        expected = dequantize(tensor.data[rows], tensor.tensor_type)
        data = file.get_data(info.name).reshape(info.shape[0], -1)[rows]
        ours = dequantise(info.format, data.reshape(-1), (len(data), info.shape[1]))
        np.testing.assert_array_equal(ours, expected)
    assert len(seen) >= 2


def test_smollm2s_vocabulary_is_byte_level() -> None:
    with open_model(get_model_path("smollm2-135m")) as model:
        vocabulary = model.vocabulary
        assert vocabulary.kind is VocabularyKind.BYTE_BPE
        assert vocabulary.pre == "smollm"
        assert len(vocabulary.tokens) == model.spec.vocab_size == 49152
        assert len(vocabulary.merges) == 48900
        assert (vocabulary.bos, vocabulary.eos) == (1, 2)
        assert {vocabulary.tokens[each] for each in vocabulary.stop_tokens} == {
            "<|im_end|>",
            "<|endoftext|>",
        }
        assert not vocabulary.add_bos
        assert vocabulary.chat_template is not None


def test_gemma3s_vocabulary_is_sentencepiece_like() -> None:
    with open_model(get_model_path("gemma3-270m")) as model:
        vocabulary = model.vocabulary
        assert vocabulary.kind is VocabularyKind.SENTENCEPIECE
        assert len(vocabulary.tokens) == len(vocabulary.scores) == model.spec.vocab_size == 262144
        assert {vocabulary.tokens[each] for each in vocabulary.stop_tokens} == {
            "<eos>",
            "<end_of_turn>",
        }
        assert vocabulary.types[vocabulary.tokens.index("</s>")] == TokenType.USER_DEFINED
        assert (vocabulary.add_bos, vocabulary.add_space_prefix) == (True, False)


def test_gemma3s_layers_slide_but_for_every_sixth() -> None:
    with open_model(get_model_path("gemma3-270m")) as model:
        windows = [layer.window for layer in model.spec.layers]
        assert windows == ([512] * 5 + [None]) * 3
        bases = {layer.window: layer.rope.base for layer in model.spec.layers}
        assert bases == {512: 10000.0, None: 1000000.0}
