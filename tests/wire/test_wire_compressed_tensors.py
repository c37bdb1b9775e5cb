"""The compressed-tensors wire: what is written is read back, what doesn't fit is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.algorithms.minmax import MinMax
from lowbit.core import (
    Activation,
    FloatCode,
    Grouping,
    IntCode,
    QuantSpec,
    QuantTensor,
    Scale,
    Zero,
    integer_spec,
    pack,
    table_spec,
)
from lowbit.errors import FormatError
from lowbit.wire import find_wire
from lowbit.wire.compressed_tensors import PRESETS, CompressedTensorsSettings, CompressedTensorsWire, Scheme
from lowbit.wire.compressed_tensors.packing import padded_words_of, to_stream, to_words, words_of

WIRE = CompressedTensorsWire()
SHAPE = (128, 256)


def parsed(**config: Any) -> CompressedTensorsSettings:
    return WIRE.parse({"quant_method": "compressed-tensors", **config})


def of_preset(name: str) -> CompressedTensorsSettings:
    return WIRE.of(parsed(config_groups={name: ["Linear"]}), "layer")


def scheme(weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, **(weights or {})}, **more}}


def a_tensor(own: CompressedTensorsSettings, shape: tuple[int, int] = SHAPE) -> QuantTensor:
    """A weight of a scheme, with scales for its activations where they are stored."""
    spec = WIRE.spec(own)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    tensor = MinMax().quantize(weight, replace(spec, activation=Activation()))
    stored = {name: torch.full(size, 2).to(dtype) for name, (size, dtype) in spec.activation.tensors().items()}
    return QuantTensor(spec, {**tensor.tensors, **stored}, shape).validate()


QUANTIZING = [name for name in PRESETS if name != "UNQUANTIZED"]


@pytest.mark.parametrize("name", QUANTIZING)
def test_what_was_written_is_read_back(name: str) -> None:
    own = of_preset(name)
    tensor = a_tensor(own)
    written = WIRE.write(own, tensor)
    assert WIRE.read(own, written).equal(tensor)
    layout = {key: (tuple(value.shape), value.dtype) for key, value in written.items()}
    assert layout == WIRE.expected(own, tensor.spec, tensor.shape)
    assert set(written) <= set(WIRE.suffixes)


@pytest.mark.parametrize("name", QUANTIZING)
def test_a_missing_or_truncated_tensor_is_named(name: str) -> None:
    own = of_preset(name)
    written = WIRE.write(own, a_tensor(own))
    for key, value in written.items():
        with pytest.raises(FormatError, match=key):
            WIRE.read(own, {other: kept for other, kept in written.items() if other != key})
        for cut in (value[:-1], value[..., :-1].contiguous()) if value.numel() > 1 else ():
            try:
                read = WIRE.read(own, {**written, key: cut})
            except FormatError:
                continue
            # Unpacked codes with one scale per row or block are a weight of any size; the module's decides on loading.
            assert key == "weight" and read.shape == tuple(cut.shape)
        with pytest.raises(FormatError):
            WIRE.read(own, {**written, key: value.to(torch.float64)})


@pytest.mark.parametrize("name", QUANTIZING)
def test_the_config_is_understood_again(name: str) -> None:
    own = parsed(config_groups={name: ["Linear"]}, ignore=["lm_head"], format="mixed-precision")
    config = WIRE.config(own)
    assert find_wire(config).name == "compressed-tensors"
    assert WIRE.parse(config) == own
    spec = WIRE.spec(WIRE.of(own, "layer"))
    again = WIRE.settings_for(spec)
    assert replace(again.scheme, format=None) == replace(own.scheme, format=None)
    assert WIRE.spelling(again, spec) == spec


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]), st.integers(1, 200), st.booleans(), st.data())
@settings(max_examples=60)
def test_both_packings_are_told_apart(bits: int, count: int, padded: bool, data: st.DataObject) -> None:
    values = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)))
    # Where both take as many words, bits in the right places decide; without any in the last place nothing can.
    values[-1] = 2**bits - 1
    dense = pack(values.unsqueeze(0), bits)
    words = pad_words(values, bits) if padded else to_words(dense)
    same_width = words_of(count, bits) == padded_words_of(count, bits)
    if same_width and not padded and count > 32 // bits and not loose_bits_set(words, bits):
        return  # no bit is where padding would be
    assert torch.equal(to_stream("weight_packed", words, count, bits), dense)


def pad_words(values: Tensor, bits: int) -> Tensor:
    per_word = 32 // bits
    rows = torch.nn.functional.pad(values, (0, -len(values) % per_word)).view(-1, per_word)
    return to_words(pack(torch.nn.functional.pad(pack(rows, bits), (0, 4 - -(-per_word * bits // 8))), 8)).view(1, -1)


def loose_bits_set(words: Tensor, bits: int) -> bool:
    return bool(((words.to(torch.int64) & 0xFFFFFFFF) >> 32 // bits * bits).any())


def test_padding_with_bits_in_it_is_refused() -> None:
    words = pad_words(torch.arange(64) % 8, 3)
    words[0, 2] |= 1 << 30
    with pytest.raises(FormatError, match="belong to none"):
        to_stream("weight_packed", words, 64, 3)
    dense = to_words(pack(torch.full((1, 33), 7), 3))
    dense[0, -1] |= 1 << 20
    with pytest.raises(FormatError, match="behind the last|belong to none"):
        to_stream("weight_packed", dense, 33, 3)


def test_a_group_index_is_kept_and_a_plain_one_recognised() -> None:
    own = parsed(
        config_groups=scheme({"group_size": 32, "symmetric": False, "actorder": "group"}), format="pack-quantized"
    )
    own = WIRE.of(own, "layer")
    tensor = a_tensor(own)
    written = WIRE.write(own, tensor)
    assert torch.equal(written["weight_g_idx"], torch.arange(256, dtype=torch.int32) // 32)
    assert WIRE.read(own, written).equal(tensor)
    shuffled = written["weight_g_idx"][torch.randperm(256)]
    permuted = WIRE.read(own, {**written, "weight_g_idx": shuffled})
    assert permuted.spec.grouping.permuted
    assert torch.equal(WIRE.write(own, permuted)["weight_g_idx"], shuffled)
    never_set = {**written, "weight_g_idx": torch.full((256,), -1, dtype=torch.int32)}
    assert WIRE.read(own, never_set).equal(tensor)
    without = replace(own, schemes=(replace(own.scheme, weights=replace(own.weights, actorder=False)),))
    with pytest.raises(FormatError, match="no actorder"):
        WIRE.read(without, {**written, "weight_g_idx": shuffled})


@pytest.mark.parametrize(
    "spec",
    [
        integer_spec(4, 64),
        integer_spec(3, -1, scale_dtype=torch.bfloat16),
        integer_spec(8, 128, permuted=True),
        QuantSpec(IntCode(5, signed=True), Scale(torch.float32), Grouping.groups(32), dtype=torch.float32),
        QuantSpec(IntCode(8, signed=True), Scale(torch.bfloat16), Grouping(64, 32), dtype=torch.bfloat16),
        QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(torch.float16), Grouping.per_tensor(), dtype=torch.float16),
    ],
    ids=str,
)
def test_specs_of_other_formats_have_a_scheme(spec: QuantSpec) -> None:
    own = WIRE.settings_for(spec)
    assert WIRE.spelling(own, spec) == spec
    assert WIRE.refusal(own, spec, SHAPE) is None


@pytest.mark.parametrize(
    "spec",
    [
        table_spec("nf4"),
        QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(64)),
        QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(64), Zero("float")),
        QuantSpec(IntCode(4, signed=True), Scale(torch.float16), Grouping.flat_blocks(64)),
        QuantSpec(IntCode(8, signed=True), Scale(torch.float32, multiplier=0.5), Grouping.per_channel()),
        QuantSpec(FloatCode(torch.float8_e5m2), Scale(torch.float16), Grouping.per_channel()),
        QuantSpec(
            IntCode(8, signed=True), Scale(torch.float16), Grouping.per_channel(), activation=Activation("int8", 6.0)
        ),
        QuantSpec(
            FloatCode(torch.float8_e4m3fn),
            Scale(torch.float32),
            Grouping.per_channel(),
            activation=Activation("dynamic", number="float8_e4m3fn", bound=1200.0),
        ),
    ],
    ids=str,
)
def test_specs_without_a_scheme_are_refused(spec: QuantSpec) -> None:
    with pytest.raises(FormatError):
        WIRE.settings_for(spec)


def test_modules_have_the_scheme_of_their_most_telling_target() -> None:
    groups = {
        "W8A16": ["Linear"],
        "W4A16": ["re:.*mlp.*"],
        "W3A16": ["model.layers.0.mlp.up_proj"],
        "W2A16": ["re:.*mlp.down.*"],
    }
    own = parsed(config_groups=groups, ignore=["lm_head", "re:.*layers.9.*"])

    def bits(module: str) -> int | None:
        schemes = WIRE.of(own, module).schemes
        return schemes[0].weights.bits if schemes and schemes[0].weights else None

    assert bits("model.layers.0.mlp.up_proj") == 3
    assert bits("model.layers.1.mlp.up_proj") == 4
    assert bits("model.layers.1.self_attn.q_proj") == 8
    assert bits("model.layers.1.mlp.down_proj") == 4  # expressions in alphabetical order
    assert bits("model.layers.9.mlp.up_proj") is None
    assert bits("lm_head") is None
    assert bits("model.embed_tokens") == 8
    own = parsed(config_groups={**groups, "W5A16": ["Embedding"]})
    assert bits("model.embed_tokens") == 5


def test_one_checkpoint_of_several_schemes() -> None:
    four, eight = WIRE.settings_for(integer_spec(4, 64)), WIRE.settings_for(integer_spec(8, -1))
    joined = WIRE.join({"a": four, "b": eight, "c": four}, ["lm_head"])
    assert joined.format == "pack-quantized" and joined.ignore == ("lm_head",)
    again = WIRE.parse(WIRE.config(joined))
    assert [WIRE.of(again, name).weights.bits for name in "abc"] == [4, 8, 4]
    float8 = WIRE.settings_for(
        QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(torch.float16), Grouping.per_tensor(), dtype=torch.float16)
    )
    assert WIRE.join({"a": four, "b": float8}, []).format == "mixed-precision"


def test_nested_configs_of_older_files() -> None:
    inner = {
        "quant_method": "compressed-tensors",
        "config_groups": scheme({"group_size": 32}),
        "format": "pack-quantized",
    }
    outer = {"quantization_config": inner, "sparsity_config": {"format": "dense"}}
    assert find_wire(outer).name == "compressed-tensors"
    assert WIRE.parse(outer) == WIRE.parse(inner)


def test_sparse_weights_in_two_forms() -> None:
    weight = torch.randn(8, 32).to(torch.bfloat16)
    weight[:, 1::2] = 0
    for spelled, rows in (("sparse-bitmask", True), ("sparse-24-bitmask", False)):
        own = WIRE.of(parsed(sparsity_config={"format": spelled, "targets": ["Linear"]}), "layer")
        tensor = QuantTensor(replace(WIRE.spec(own), dtype=torch.bfloat16), {"codes": weight}, (8, 32)).validate()
        written = WIRE.write(own, tensor)
        assert ("row_offsets" in written) == rows
        assert WIRE.read(own, written).equal(tensor)
        assert WIRE.modules([f"layer.{name}" for name in written]) == ["layer"]
    with pytest.raises(FormatError, match="2:4"):
        WIRE.write(own, QuantTensor(tensor.spec, {"codes": torch.ones(8, 32, dtype=torch.bfloat16)}, (8, 32)))


def test_what_a_scheme_cannot_hold() -> None:
    own = of_preset("W4A16")
    assert "don't divide" in str(WIRE.refusal(own, WIRE.spec(own), (64, 192)))
    own = of_preset("FP8_BLOCK")
    assert "activations" in str(WIRE.refusal(own, WIRE.spec(own), (64, 192)))
    with pytest.raises(FormatError, match="can't spell"):
        WIRE.write(of_preset("W8A16"), a_tensor(of_preset("W4A16")))
    assert Scheme().inferred_format == "pack-quantized"


def test_variants_are_presets_and_formats() -> None:
    four = WIRE.settings_for(integer_spec(4, 32))
    tensor = a_tensor(four)
    wide = WIRE.vary(four, "int-quantized")
    assert WIRE.write(wide, tensor)["weight"].dtype == torch.int8
    assert WIRE.read(wide, WIRE.write(wide, tensor)).equal(tensor)
    assert WIRE.spec(WIRE.vary(four, "mxfp4")) == WIRE.spec(of_preset("MXFP4"))
    for variant in ("float-quantized", "marlin-24", "W9A9"):
        with pytest.raises(FormatError):
            WIRE.vary(four, variant)
