from __future__ import annotations

import pytest
import torch

from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero
from lowbit.errors import FormatError


@pytest.fixture
def tensor() -> QuantTensor:
    return RoundToNearest().quantize(torch.randn(64, 256), integer_spec(4, 128))


def test_bits_are_counted_from_the_tensors(tensor: QuantTensor) -> None:
    assert tensor.nbytes == 64 * 128 + 64 * 2 * 2 + 64
    assert tensor.bits_per_weight == pytest.approx(4 + 16 / 128 + 8 / 256)


@pytest.mark.parametrize("name", ["codes", "scales", "zeros"])
def test_a_wrong_shape_names_the_tensor(tensor: QuantTensor, name: str) -> None:
    broken = {**tensor.tensors, name: tensor.tensors[name][:-1]}
    with pytest.raises(FormatError, match=rf"{name}: wrong shape .*found \[63.*expected \[64"):
        QuantTensor(tensor.spec, broken, tensor.shape).validate()


def test_a_wrong_dtype_names_both(tensor: QuantTensor) -> None:
    broken = {**tensor.tensors, "scales": tensor.tensors["scales"].float()}
    with pytest.raises(FormatError, match=r"scales: wrong dtype .*float32.*float16"):
        QuantTensor(tensor.spec, broken, tensor.shape).validate()


def test_missing_and_extra_tensors_are_named(tensor: QuantTensor) -> None:
    with pytest.raises(FormatError, match="don't match the spec"):
        QuantTensor(tensor.spec, {"codes": tensor.tensors["codes"]}, tensor.shape).validate()


@pytest.mark.parametrize("bad", [-1, 4])
def test_group_index_out_of_range(bad: int) -> None:
    spec = QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(8, permuted=True), Zero("integer", 4))
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in spec.tensors((4, 32)).items()}
    QuantTensor(spec, tensors, (4, 32)).validate()
    tensors["group_index"][3] = bad
    with pytest.raises(FormatError, match=r"group_index: .*out of range .*expected 0\.\.3"):
        QuantTensor(spec, tensors, (4, 32)).validate()


def test_equal_compares_bits(tensor: QuantTensor) -> None:
    same = QuantTensor(tensor.spec, {name: value.clone() for name, value in tensor.tensors.items()}, tensor.shape)
    assert tensor.equal(same)
    same.tensors["scales"][0, 0] *= 2
    assert not tensor.equal(same)


@pytest.mark.parametrize("shape", [(0, 256), (64, 0), (0, 0)])
@pytest.mark.parametrize("grouping", [Grouping.per_channel(), Grouping.per_tensor(), Grouping.groups(32)], ids=str)
def test_a_weight_without_rows_or_columns_is_refused(shape: tuple[int, int], grouping: Grouping) -> None:
    spec = QuantSpec(IntCode(8), Scale(torch.float16), grouping)
    tensors = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in spec.tensors(shape).items()}
    with pytest.raises(FormatError, match="a weight has rows and columns"):
        QuantTensor(spec, tensors, shape).validate()
