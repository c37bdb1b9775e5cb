"""Damaged, hostile and misleading checkpoints: one `FormatError` that says what and where, or the right model."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import FormatError

MODULE = "model.layers.0.mlp.down_proj"
Damage = Callable[[Path], None]


@pytest.fixture(scope="session")
def originals(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    configs = {
        "gptq": lowbit.GPTQConfig(bits=4),
        "awq": lowbit.AwqConfig(),
        "nf4": lowbit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": lowbit.BitsAndBytesConfig(load_in_8bit=True),
    }
    folders = {}
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp(name)
        lowbit.AutoModelForCausalLM.from_pretrained(small, quantization_config=config).save_pretrained(folders[name])
    return folders


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        for path in originals[kind].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return make


def open_all(folder: Path) -> None:
    checkpoint = lowbit.open_checkpoint(folder)
    for tensor in checkpoint.weights.values():
        tensor.dequantize()


def load(folder: Path) -> None:
    lowbit.AutoModelForCausalLM.from_pretrained(folder)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def header(folder: Path, data: bytes, length: int | None = None) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data) if length is None else length) + data)


CONTAINERS: dict[str, Damage] = {
    "empty file": lambda d: (d / "model.safetensors").write_bytes(b""),
    "under 8 bytes": lambda d: (d / "model.safetensors").write_bytes(b"1234"),
    "git-lfs pointer": lambda d: (d / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid x"
    ),
    "header past the file": lambda d: header(d, b"{}", 10**6),
    "header of 2**64-1 bytes": lambda d: header(d, b"{}", 2**64 - 1),
    "header over 100 MB": lambda d: header(d, b"{}", 2 * 10**8),
    "header not UTF-8": lambda d: header(d, b"\xff\xfe\xff\xff"),
    "header not JSON": lambda d: header(d, b"{nope}"),
    "header not an object": lambda d: header(d, b"[1, 2]"),
    "header nested deep": lambda d: header(d, b"[" * 10**5),
    "negative offset": lambda d: header(d, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}'),
    "end before begin": lambda d: header(d, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[2,1]}}'),
    "size against shape": lambda d: header(d, b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,1]}}x'),
    "shape overflows": lambda d: header(
        d, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,1]}}x'
    ),
    "unknown dtype": lambda d: header(d, b'{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}}x'),
    "trailing bytes": lambda d: header(d, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}xyz'),
    "truncated": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
    "missing": lambda d: (d / "model.safetensors").unlink(),
    "only pickled": lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
}


@pytest.mark.parametrize("damage", CONTAINERS, ids=str)
def test_containers(damage: str, copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    CONTAINERS[damage](folder)
    with pytest.raises(FormatError) as error:
        open_all(folder)
    assert str(folder) in str(error.value)
    with pytest.raises((FormatError, OSError)):
        load(folder)


def test_pickles_are_refused_with_the_way_out(copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    CONTAINERS["only pickled"](folder)
    with pytest.raises(FormatError, match="convert them to safetensors"):
        lowbit.open_checkpoint(folder)
    with pytest.raises(FormatError, match="convert them to safetensors"):
        load(folder)


def shard(folder: Path, names: list[str], weight_map: dict[str, str] | None = None) -> None:
    """Split the tensors over files called `names`, with an index that may lie."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [dict(list(tensors.items())[index :: len(names)]) for index in range(len(names))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    truth = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {}, "weight_map": truth | (weight_map or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_load(copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    shard(folder, ["a.safetensors", "b.safetensors"])
    open_all(folder)
    load(folder)


@pytest.mark.parametrize("path", ["../a.safetensors", "/etc/passwd", "..", "sub/a.safetensors"])
def test_a_shard_outside_the_folder_is_refused(path: str, copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    shard(folder, ["a.safetensors"], {f"{MODULE}.qweight": path})
    with pytest.raises(FormatError, match="leaves the folder"):
        lowbit.open_checkpoint(folder)


def test_a_tensor_that_no_shard_holds(copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    shard(folder, ["a.safetensors"], {"ghost.weight": "a.safetensors"})
    with pytest.raises(FormatError, match=r"ghost\.weight of a\.safetensors: the index lists a tensor"):
        lowbit.open_checkpoint(folder)


def test_a_missing_shard(copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    shard(folder, ["a.safetensors", "b.safetensors"])
    (folder / "b.safetensors").unlink()
    with pytest.raises(FormatError, match=r"b\.safetensors: can't be read"):
        lowbit.open_checkpoint(folder)


CONFIGS: dict[str, dict[str, Any]] = {
    "unknown method": {"quant_method": "zip"},
    "missing method": {"quant_method": None},
    "bits 0": {"bits": 0},
    "bits 33": {"bits": 33},
    "bits as text": {"bits": "4"},
    "bits 4.5": {"bits": 4.5},
    "bits true": {"bits": True},
    "bits against the tensors": {"bits": 8},
    "group 0": {"group_size": 0},
    "group -2": {"group_size": -2},
    "group of text": {"group_size": "128"},
    "another group": {"group_size": 64},
    "another method": {"quant_method": "awq"},
    "unknown version": {"checkpoint_format": "gptq_v9"},
    "version 2 zeros declared as 1": {"checkpoint_format": "gptq", "meta": None},
}


@pytest.mark.parametrize("change", CONFIGS)
def test_configs(change: str, copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    if change == "version 2 zeros declared as 1":
        edit_tensors(folder, lambda t: t.update({f"{MODULE}.qzeros": t[f"{MODULE}.qzeros"] + 0x11111111}))
    edit_config(folder, **CONFIGS[change])
    with pytest.raises(FormatError):
        open_all(folder)
    with pytest.raises((FormatError, ValueError)):
        load(folder)


def test_a_config_that_is_not_an_object(copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    for text in ("[]", "3", "{", '{"quantization_config": "gptq"}', "[" * 10**5):
        (folder / "config.json").write_text(text)
        with pytest.raises(FormatError):
            lowbit.open_checkpoint(folder)


def test_a_declared_format_without_a_quantized_tensor(small: Path, tmp_path: Path) -> None:
    for path in small.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for reader in (lowbit.open_checkpoint, load):
        with pytest.raises(FormatError, match="declares a quantized checkpoint, but no tensor is"):
            reader(tmp_path)


def state(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    """Change the JSON of one weight's bitsandbytes state."""
    name = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
    data = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def raw_state(tensors: dict[str, torch.Tensor], data: bytes) -> None:
    tensors[f"{MODULE}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(data), dtype=torch.uint8)


def cut(suffix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda t: t.update({f"{MODULE}.{suffix}": t[f"{MODULE}.{suffix}"][:-1].clone()})


def drop(suffix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda t: t.pop(f"{MODULE}.{suffix}")


def put(suffix: str, position: int, value: int) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.{suffix}"][position] = value

    return change


TENSORS: dict[tuple[str, str], Callable[[dict[str, torch.Tensor]], Any]] = {
    ("gptq", "g_idx negative"): put("g_idx", 0, -1),
    ("gptq", "g_idx past the groups"): put("g_idx", 5, 99),
    ("gptq", "g_idx too short"): cut("g_idx"),
    ("gptq", "scales too short"): cut("scales"),
    ("gptq", "qzeros too short"): cut("qzeros"),
    ("gptq", "qweight too short"): cut("qweight"),
    ("gptq", "qzeros missing"): drop("qzeros"),
    ("gptq", "scales missing"): drop("scales"),
    ("gptq", "qweight of floats"): lambda t: t.update({f"{MODULE}.qweight": t[f"{MODULE}.qweight"].float()}),
    ("awq", "gemv stored where gemm is declared"): lambda t: t.update(
        {f"{MODULE}.qweight": t[f"{MODULE}.qweight"].t().contiguous()}
    ),
    ("awq", "scales missing"): drop("scales"),
    ("awq", "qweight too short"): cut("qweight"),
    ("nf4", "absmax too short"): cut("weight.absmax"),
    ("nf4", "weight too short"): cut("weight"),
    ("nf4", "table not 16 long"): cut("weight.quant_map"),
    ("nf4", "nested absmax missing"): drop("weight.nested_absmax"),
    ("nf4", "state missing"): drop("weight.quant_state.bitsandbytes__nf4"),
    ("nf4", "block size 0"): lambda t: state(t, blocksize=0),
    ("nf4", "block size of text"): lambda t: state(t, blocksize="64"),
    ("nf4", "dtype load"): lambda t: state(t, dtype="load"),
    ("nf4", "dtype Tensor"): lambda t: state(t, dtype="torch.Tensor"),
    ("nf4", "another type"): lambda t: state(t, quant_type="fp4"),
    ("nf4", "another shape"): lambda t: state(t, shape=[768, 256]),
    ("nf4", "a negative shape"): lambda t: state(t, shape=[-256, -768]),
    ("nf4", "a huge shape"): lambda t: state(t, shape=[10**9, 10**9]),
    ("nf4", "three dimensions"): lambda t: state(t, shape=[1, 256, 768]),
    ("nf4", "state not UTF-8"): lambda t: raw_state(t, b"\xff\xff"),
    ("nf4", "state not JSON"): lambda t: raw_state(t, b"{"),
    ("nf4", "state huge"): lambda t: raw_state(t, b" " * 100_000),
    ("nf4", "state nested deep"): lambda t: raw_state(t, b"[" * 4000),
    ("int8", "SCB too short"): cut("SCB"),
    ("int8", "weight too short"): cut("weight"),
    ("int8", "another layout"): lambda t: t.update({f"{MODULE}.weight_format": torch.tensor(2, dtype=torch.uint8)}),
    ("int8", "weight of floats"): lambda t: t.update({f"{MODULE}.weight": t[f"{MODULE}.weight"].half()}),
}


# A weight of another shape is a weight: only the module says that it is the wrong one.
FOUND_ONLY_WITH_THE_MODEL = {
    ("nf4", "another shape"),
    ("awq", "gemv stored where gemm is declared"),
    ("gptq", "qweight too short"),
}


@pytest.mark.parametrize(("kind", "change"), TENSORS)
def test_tensors(kind: str, change: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    edit_tensors(folder, TENSORS[kind, change])
    if (kind, change) not in FOUND_ONLY_WITH_THE_MODEL:
        with pytest.raises(FormatError) as error:
            open_all(folder)
        assert MODULE in str(error.value)
    with pytest.raises(FormatError) as error:
        load(folder)
    assert MODULE in str(error.value)


@pytest.mark.parametrize("kind", ["gptq", "nf4", "int8"])
def test_nothing_is_left_at_random_values(kind: str, copy: Callable[[str], Path]) -> None:
    for victim in (f"{MODULE}.", "model.layers.2.input_layernorm.", "model.embed_tokens."):
        folder = copy(kind)
        edit_tensors(folder, lambda t, v=victim: [t.pop(key) for key in list(t) if key.startswith(v)])
        with pytest.raises(FormatError, match="left at random values") as error:
            load(folder)
        assert victim.rstrip(".") in str(error.value)
        lowbit.register()
        try:
            with pytest.raises(FormatError, match="left at random values"):
                transformers.AutoModelForCausalLM.from_pretrained(folder)
        finally:
            lowbit.unregister()


def test_a_packed_weight_for_a_tied_module(copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    edit_tensors(
        folder, lambda t: t.update({k.replace(MODULE, "lm_head"): v.clone() for k, v in t.items() if MODULE in k})
    )
    with pytest.raises(FormatError, match="lm_head.*ties to another"):
        load(folder)


def test_an_error_leaves_no_hook_behind(copy: Callable[[str], Path]) -> None:
    from transformers.quantizers import auto

    before = auto.AUTO_QUANTIZER_MAPPING["gptq"]
    folder = copy("gptq")
    edit_tensors(folder, drop("scales"))
    with pytest.raises(FormatError):
        load(folder)
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is before


def test_import_has_no_side_effects() -> None:
    code = (
        "import sys, lowbit; heavy = {'torch', 'transformers', 'accelerate', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy; import lowbit.integrations.transformers, transformers.quantizers.auto as a;"
        "assert a.AUTO_QUANTIZER_MAPPING['gptq'].__module__.startswith('transformers')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
