from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.core import pack, packed_bytes, unpack
from lowbit.core.packing import sign_extend
from lowbit.errors import SpecError


def bit_by_bit(values: list[int], bits: int) -> list[int]:
    """The definition, written as slowly as possible."""
    stream = [value >> position & 1 for value in values for position in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << position for position, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]


@given(
    st.integers(1, 8).flatmap(
        lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), min_size=1, max_size=70))
    )
)
def test_pack_is_a_dense_stream_with_the_lowest_bit_first(case: tuple[int, list[int]]) -> None:
    bits, values = case
    packed = pack(torch.tensor(values), bits)
    assert packed.tolist() == bit_by_bit(values, bits)
    assert unpack(packed, bits, len(values)).tolist() == values


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_axes_are_kept(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 2, 13))
    packed = pack(values, bits)
    assert packed.shape == (3, 2, packed_bytes(13, bits))
    assert torch.equal(unpack(packed, bits, 13).long(), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_negative_values_are_twos_complement(bits: int) -> None:
    values = torch.arange(-(1 << bits - 1), 1 << bits - 1)
    assert torch.equal(sign_extend(unpack(pack(values, bits), bits, len(values)), bits).long(), values)


def test_three_bits_fill_words_as_gptq_packs_them() -> None:
    values = torch.arange(32) % 8
    words = pack(values, 3).view(torch.int32).tolist()
    v = values.tolist()
    first = sum(v[i] << 3 * i for i in range(10)) | (v[10] & 3) << 30
    assert words[0] & 0xFFFFFFFF == first
    assert words[1] & 1 == v[10] >> 2


def test_a_wrong_size_is_an_error() -> None:
    with pytest.raises(SpecError, match="9 values of 4 bits take 5 bytes, not 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 9)
    with pytest.raises(SpecError, match="1 to 8"):
        pack(torch.zeros(4), 9)
