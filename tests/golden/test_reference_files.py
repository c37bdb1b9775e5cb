"""Checkpoints of formats whose own libraries need a GPU: weights to the bit, bytes written again, logits.

They lie beside the repository, not in it. ``meta.json`` has a digest of every dequantized weight, ``expected.npz``
projections of all of them, two in full, and logits: ``logits_ref`` of the dense weights, ``logits_peer`` of the
original's forward, with rounded activations.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowbit
from lowbit.core import dtypes
from lowbit.nn import QuantLinear

FIXTURES = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures"
# Dtype of the model, which logits, and a bound of the mean difference: twice what was seen, but for FBGEMM. That model
# amplifies every rounding: another implementation of attention alone makes 0.24. Seen are 0.33, and 0.63 where
# activations are left as they are.
CASES = {
    "eetq_int8_1L": (torch.float16, "logits_ref", 0.023),
    "fbgemm_fp8_1L": (torch.bfloat16, "logits_peer", 0.45),
    "torchao_int4wo_plain_g128": (torch.float32, "logits_ref", 0.0019),
}

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no {FIXTURES.parent.name}/{FIXTURES.name} there")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Path, dict[str, Any], Any]:
    path = FIXTURES / request.param
    return request.param, path / "ckpt", json.loads((path / "meta.json").read_text()), np.load(path / "expected.npz")


def test_weights_are_those_of_the_original_and_bytes_are_written_again(case: tuple[Any, ...]) -> None:
    _, path, meta, expected = case
    projection = torch.tensor(np.load(FIXTURES / "_R.npy"))
    checkpoint = lowbit.open_checkpoint(path)
    assert set(checkpoint.weights) == set(meta["modules"])
    for name, entry in meta["modules"].items():
        tensor = checkpoint.weights[name]
        dense = tensor.dequantize(dtypes.parse(entry["dtype"]))
        assert list(dense.shape) == entry["shape"], name
        assert hashlib.sha256(dense.contiguous().numpy().tobytes()).hexdigest() == entry["sha256"], name
        projected = dense.double() @ projection[: dense.shape[1]]
        assert torch.allclose(projected, torch.tensor(expected[f"proj/{name}"]), atol=1e-12), name
        if entry["full"]:
            assert torch.equal(dense, torch.tensor(expected[f"full/{name}"])), name
        written = checkpoint.wire.write(checkpoint.wire.of(checkpoint.settings, name), tensor)
        for suffix, part in written.items():
            stored = checkpoint.files.tensor(f"{name}.{suffix}")
            assert (part.shape, part.dtype) == (stored.shape, stored.dtype), (name, suffix)
            assert torch.equal(part.contiguous().view(torch.uint8), stored.view(torch.uint8)), (name, suffix)


def test_the_model_runs_packed_with_the_logits_of_the_original(case: tuple[Any, ...], tmp_path: Path) -> None:
    kind, path, meta, expected = case
    dtype, logits, bound = CASES[kind]
    model = lowbit.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert packed == list(meta["modules"])
    with torch.no_grad():
        ours = model(torch.tensor(expected["ids"])).logits[0].float()
    assert (ours - torch.tensor(expected[logits])).abs().mean() <= bound
    model.save_pretrained(tmp_path)
    theirs, again = lowbit.open_checkpoint(path), lowbit.open_checkpoint(tmp_path)
    assert again.config == theirs.config
    assert all(again.weights[name].equal(theirs.weights[name]) for name in packed)
