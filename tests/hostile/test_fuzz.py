"""Structure-aware fuzzing: valid checkpoints with one to three things changed give weights or one error, nothing else.

``LOWBIT_FUZZ_EXAMPLES`` says how many of each sample are tried; ``make fuzz`` draws new ones each time. What was found
this way stands below by name.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import resource
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowbit
from lowbit.core import QuantTensor
from lowbit.errors import LowbitError
from lowbit.integrations.transformers.gguf.tokenizer import tokenizer_of
from lowbit.wire.gguf import Entry, GgmlType, open_gguf, write_gguf
from lowbit.wire.gguf.config import config_of
from samples import MODEL, MODULES, Sample, samples

EXAMPLES = int(os.environ.get("LOWBIT_FUZZ_EXAMPLES", "25"))
SECONDS = 5.0  # of CPU time for one example; most take milliseconds
BYTES = 3 * 2**30  # of address space beyond what the process has; samples take a few kilobytes

fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
every_sample = pytest.mark.parametrize("sample", samples(), ids=str)

NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 8, 16, 31, 33, 64, 128, 255, 2**31, 2**32, 2**63, 2**64, 2**70])
SCALARS = st.one_of(
    NUMBERS,
    st.sampled_from([True, False, None, 0.5, -0.0, 1e300, float("inf"), float("nan")]),
    st.sampled_from(["", "4", "int4", "fp8", "none", "torch.float16", "float16", "load", "__import__('os')", "(a+)+$"]),
    st.text(max_size=8),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=4), SCALARS, max_size=3))
DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
FILLS = (0, 1, -1, 127, 255, float("inf"), float("nan"), -0.0, 1e-45, 1e30)


@pytest.fixture(scope="module", autouse=True)
def _everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    for sample in samples():
        lowbit.open_checkpoint(sample.save(tmp_path_factory.mktemp("sample")))


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """What needs more address space than this fails at once, instead of taking the machine down."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(folder: Path) -> None:
    """Read everything: weights that hold together, or an error of lowbit's that is short; in bounded time."""
    start, said = time.process_time(), ""
    try:
        checkpoint = lowbit.open_checkpoint(folder)
        for tensor in checkpoint.weights.values():
            assert isinstance(tensor, QuantTensor)
            assert tuple(tensor.validate().dequantize().shape) == tensor.shape
    except LowbitError as error:
        said = str(error)
    assert len(said) < 4000
    assert time.process_time() - start < SECONDS


# ------------------------------------------------------------------------------------------------------- the changes


def change_json(draw: st.DrawFn, data: Any) -> Any:
    """A JSON value with one thing in it replaced, removed or added."""
    data = copy.deepcopy(data)
    places = list(_places(data))
    if not places:
        return draw(VALUES)
    holder, key = draw(st.sampled_from(places))
    action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if action == "remove":
        del holder[key]
    elif action == "add" and isinstance(holder, dict):
        holder[draw(st.text(max_size=6))] = draw(VALUES)
    else:
        holder[key] = draw(VALUES)
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in list(keys):
        yield data, key
        yield from _places(data[key])


def change_tensors(draw: st.DrawFn, tensors: dict[str, Tensor]) -> None:
    packed = sorted(name for name in tensors if name.startswith(MODULES[0]))
    if not packed:
        return
    name = draw(st.sampled_from(packed))
    tensor = tensors[name]
    action = draw(st.sampled_from(["shape", "dtype", "values", "fill", "drop", "rename", "swap", "text"]))
    if action == "drop":
        del tensors[name]
    elif action == "rename":
        tensors[
            draw(st.sampled_from([f"{name}x", name.rpartition(".")[0], f"{MODULES[0]}.weight", "lm_head.scales"]))
        ] = tensors.pop(name)
    elif action == "swap":
        tensors[name] = tensors[draw(st.sampled_from(packed))].clone()
    else:
        tensors[name] = _changed(draw, tensor, action)


def _changed(draw: st.DrawFn, tensor: Tensor, action: str) -> Tensor:
    if action == "shape":
        return _reshaped(draw, tensor)
    if action == "dtype":
        return _recast(draw, tensor)
    if action == "text":
        return torch.tensor(list(draw(st.binary(max_size=40))), dtype=torch.uint8)
    if tensor.numel() == 0:
        return tensor
    raw = tensor.reshape(-1).clone()
    if action == "fill":
        return torch.full_like(raw.float(), draw(st.sampled_from(FILLS))).to(tensor.dtype).view(tensor.shape)
    data = raw.view(torch.uint8)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, data.numel() - 1))] = draw(st.integers(0, 255))
    return data.view(tensor.dtype).view(tensor.shape)


def _reshaped(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    if tensor.dim() == 0 or draw(st.booleans()):
        shapes = [(-1,), (1, -1), (-1, 1), (1, 1, -1), (2, -1)]
        shape = draw(st.sampled_from(shapes))
        fits = tensor.numel() > 0 and (shape != (2, -1) or tensor.numel() % 2 == 0)
        return tensor.reshape(shape) if fits else tensor.new_zeros(3)
    axis = draw(st.integers(0, tensor.dim() - 1))
    size = draw(st.integers(0, tensor.shape[axis]))
    if draw(st.booleans()):
        return torch.cat([tensor, tensor.narrow(axis, 0, size)], dim=axis).contiguous()
    return tensor.narrow(axis, 0, size).contiguous()


def _recast(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.booleans()) or tensor.dim() == 0 or tensor.nbytes % dtype.itemsize:
        return tensor.float().to(dtype)
    return tensor.reshape(-1).contiguous().view(torch.uint8).view(dtype)


def change_bytes(draw: st.DrawFn, path: Path) -> None:
    """Change the file itself: its header as JSON, or any byte of header or length."""
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    if draw(st.booleans()):
        header = change_json(draw, json.loads(data[8 : 8 + length]))
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        return
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, min(len(data), 8 + length) - 1))] = draw(st.integers(0, 255))
    path.write_bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else data)


@every_sample
@fuzz
@given(data=st.data())
def test_a_changed_checkpoint_is_read_or_refused(sample: Sample, data: st.DataObject) -> None:
    config, tensors, metadata = copy.deepcopy(sample.config), dict(sample.tensors), dict(sample.metadata)
    bytewise = False
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["config", "tensors", "tensors", "metadata", "bytes"]))
        if kind == "config":
            changed = change_json(data.draw, config)
            config = changed if isinstance(changed, dict) else config
        elif kind == "tensors":
            change_tensors(data.draw, tensors)
        elif kind == "metadata" and metadata:
            _change_metadata(data.draw, metadata)
        bytewise |= kind == "bytes"
    with tempfile.TemporaryDirectory() as name:
        changed_sample = Sample(sample.wire, sample.spec, config, tensors, metadata)
        folder = changed_sample.save(Path(name))
        if bytewise:
            change_bytes(data.draw, folder / "model.safetensors")
        check(folder)


def _change_metadata(draw: st.DrawFn, metadata: dict[str, str]) -> None:
    name = draw(st.sampled_from(sorted(metadata)))
    try:
        inner = json.loads(metadata[name])
    except ValueError:
        inner = metadata[name]
    action = draw(st.sampled_from(["inside", "text", "remove"]))
    if action == "remove":
        del metadata[name]
    else:
        metadata[name] = json.dumps(change_json(draw, inner)) if action == "inside" else draw(st.text(max_size=20))


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
}
_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NAMES = ("token_embd.weight", *(f"blk.{layer}.{part}.weight" for layer in range(2) for part in _PARTS))
_KINDS = (*(kind for kind in GgmlType if not kind.dense), GgmlType.F32, GgmlType.F16, GgmlType.BF16)


@fuzz
@given(data=st.data())
def test_a_changed_gguf_file_is_read_or_refused(data: st.DataObject) -> None:
    """Files whose container is right: what their metadata and tables say is changed."""
    metadata: dict[str, Any] = dict(LLAMA)
    tensors = dict.fromkeys(_NAMES, ((32, 256), GgmlType.Q8_0))
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            key = data.draw(st.sampled_from([*sorted(LLAMA), "general.alignment", "split.count", "llama.rope.scaling"]))
            metadata[key] = data.draw(st.one_of(SCALARS, st.lists(NUMBERS, max_size=3)))
        else:
            name = data.draw(st.sampled_from(_NAMES))
            tensors.pop(name, None)
            renamed = data.draw(
                st.sampled_from([name, f"{name}.x", name.replace("0", "10000000"), "rope_freqs.weight"])
            )
            sides = data.draw(st.lists(st.sampled_from([0, 1, 2, 32, 33, 256, 2**20]), min_size=1, max_size=3))
            tensors[renamed] = (tuple(sides), data.draw(st.sampled_from(_KINDS)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        if _write_gguf(path, metadata, tensors):
            check(path)
            with contextlib.suppress(LowbitError):
                config_of(open_gguf(path))
                tokenizer_of(open_gguf(path).metadata)


def _write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], GgmlType]]) -> bool:
    """Whether there is such a file: what the format itself can't hold is tried byte by byte elsewhere."""
    entries = []
    for name, (shape, kind) in tensors.items():
        rows = math.prod(shape[:-1])
        if shape[-1] % kind.block_elements or rows * kind.row_bytes(shape[-1]) > 2**20:
            return False
        size = rows * kind.row_bytes(shape[-1])
        entries.append(Entry(name, shape, kind, functools.partial(bytes, size)))
    try:
        write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, entries)
    except (LowbitError, ValueError, OverflowError, TypeError, struct.error):
        return False
    return True


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner)))
def test_any_json_as_a_config_is_understood_or_refused(config: Any) -> None:
    sample = samples()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = sample.save(Path(name))
        (folder / "config.json").write_text(json.dumps({**MODEL, "quantization_config": config}))
        check(folder)
