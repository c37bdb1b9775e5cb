"""What only a GPU shows: placement across devices, kernels chosen there, and the same bytes saved from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import formats
import lowbit
import tiny
from lowbit.algorithms import int8_spec, quantize
from lowbit.core import linear
from lowbit.nn import QuantLinear

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # A static cache makes generate() compile, and that imports parts of torch that warn of themselves.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

CONFIGS = {
    "nf4": lambda: lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: lowbit.GPTQConfig(bits=4),
    "gptq-3": lambda: lowbit.GPTQConfig(bits=3, group_size=64, sym=False),
    "awq": lambda: lowbit.AwqConfig(group_size=64),
}
IDS = torch.arange(10, 40)[None]


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_saved_from_the_gpu_is_the_one_saved_from_the_cpu(method: str, small: Path, tmp_path: Path) -> None:
    load = lowbit.AutoModelForCausalLM.from_pretrained
    load(small, quantization_config=CONFIGS[method](), dtype=torch.float16, device_map="cpu").save_pretrained(
        tmp_path / "cpu"
    )
    on_gpu = load(tmp_path / "cpu", dtype=torch.float16, device_map="cuda:0")
    kernels = {module.kernel for module in on_gpu.modules() if isinstance(module, QuantLinear)}
    assert kernels == ({"triton-wna16"} if method in ("gptq", "awq") else {"torch"})
    on_gpu.save_pretrained(tmp_path / "gpu")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("cpu", "gpu"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
    assert on_gpu.get_memory_footprint() == sum(t.nbytes for t in [*on_gpu.parameters(), *on_gpu.buffers()])


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_agree_with_the_cpu(method: str, dtype: torch.dtype, small: Path, tmp_path: Path) -> None:
    load = lowbit.AutoModelForCausalLM.from_pretrained
    load(small, quantization_config=CONFIGS[method](), dtype=dtype, device_map="cpu").save_pretrained(tmp_path)
    reference = load(tmp_path, dtype=torch.float32, device_map="cpu")
    moved = load(tmp_path, dtype=dtype, device_map="cpu").to("cuda:0")
    placed = load(tmp_path, dtype=dtype, device_map="cuda:0")
    with torch.no_grad():
        exact, one, two = reference(IDS).logits, moved(IDS.cuda()).logits, placed(IDS.cuda()).logits
    assert torch.equal(one, two)
    agree = (one.argmax(-1).cpu() == exact.argmax(-1)).float().mean()
    assert agree >= 0.85
    tokens = placed.generate(IDS.cuda(), max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert tokens.shape[1] == IDS.shape[1] + 8


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_is_on_the_gpu_what_it_is_on_the_cpu(name: str, tmp_path: Path) -> None:
    on_cpu, on_gpu = _on_both(name, tmp_path)
    for (module, one), other in zip(on_cpu.named_modules(), on_gpu.modules(), strict=True):
        if isinstance(one, QuantLinear):
            assert torch.equal(one.dequantize(torch.float32), other.dequantize(torch.float32).cpu()), module
    with torch.no_grad():
        difference = (on_cpu(IDS).logits - on_gpu(IDS.cuda()).logits.cpu()).abs().max()
    # Activations near the middle of two codes go either way; a step of fp8 is 6 percent.
    rounds = any(m.spec.activation.kind != "none" for m in on_cpu.modules() if isinstance(m, QuantLinear))
    assert difference < (0.5 if rounds else 0.02)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_generates_and_saves_on_the_gpu(name: str, tmp_path: Path) -> None:
    _, on_gpu = _on_both(name, tmp_path)
    tokens = on_gpu.generate(IDS.cuda(), max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert tokens.shape[1] == IDS.shape[1] + 4
    on_gpu.save_pretrained(tmp_path / "gpu")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("cpu", "gpu"))
    assert set(before) == set(after)
    for part, tensor in before.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[part].reshape(-1).view(torch.uint8)), part


def _on_both(name: str, folder: Path) -> tuple[Any, Any]:
    """A checkpoint of a format, loaded to the CPU and to the GPU."""
    formats.make_dense(folder / "dense")
    formats.make_checkpoint(name, folder / "dense", folder / "cpu")
    load = lowbit.AutoModelForCausalLM.from_pretrained
    return tuple(load(folder / "cpu", dtype=torch.float32, device_map=place) for place in ("cpu", "cuda:0"))


@pytest.mark.parametrize("name", [name for name in formats.CONFIGS if not name.startswith("hqq")])
def test_what_is_quantized_on_the_gpu_is_what_is_quantized_on_the_cpu(name: str, tmp_path: Path) -> None:
    formats.make_dense(tmp_path / "dense")
    load = lowbit.AutoModelForCausalLM.from_pretrained
    models = [
        load(tmp_path / "dense", quantization_config=formats.CONFIGS[name](), dtype=torch.float32, device_map=place)
        for place in ("cpu", "cuda:0")
    ]
    for one, other in zip(*(model.modules() for model in models), strict=True):
        if isinstance(one, QuantLinear):
            left, right = one.quant_tensor(), other.quant_tensor().to("cpu")
            same = [(left.tensors[part] == right.tensors[part]).float().mean() for part in ("codes",)]
            assert (
                min(same) > 0.99
            )  # a division may differ in the last bit there, and tip a value that is in the middle


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_on_the_gpu_is_the_reference(rows: int, threshold: float) -> None:
    tensor = quantize(torch.randn(100, 200), int8_spec(threshold))
    inputs = torch.randn(rows, 200, dtype=torch.float16)
    inputs[:, 3] = 30
    on_gpu = tensor.to("cuda")
    ours = linear(inputs.cuda(), on_gpu.spec, on_gpu.tensors, on_gpu.shape).cpu()
    torch.testing.assert_close(ours, linear(inputs, tensor.spec, tensor.tensors, tensor.shape), rtol=2e-3, atol=0.05)


@pytest.mark.parametrize("method", CONFIGS)
def test_gpu_cpu_and_disk_together(method: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense", torch.float16)
    config: Any = CONFIGS[method]()
    if hasattr(config, "group_size"):
        config.group_size = 32
    load = lowbit.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "packed")
    whole = load(tmp_path / "packed", device_map="cuda:0")
    device_map = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": 0,
                  "model.rotary_emb": 0, "lm_head": 0}  # fmt: skip
    spread = load(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload")
    ids = tiny.inputs("llama")["input_ids"].cuda()
    with torch.no_grad():
        difference = (whole(ids).logits - spread(ids).logits).abs().max()
    assert difference < 0.02
    spread.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(
        load_file(tmp_path / "packed" / "model.safetensors")
    )


def test_the_documented_offload_example(tmp_path: Path) -> None:
    tiny.save("bloom", tmp_path)
    quantization_config = transformers.BitsAndBytesConfig(llm_int8_enable_fp32_cpu_offload=True)
    device_map = {
        "transformer.word_embeddings": 0,
        "transformer.word_embeddings_layernorm": 0,
        "lm_head": "cpu",
        "transformer.h": 0,
        "transformer.ln_f": 0,
    }
    model_8bit = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, quantization_config=quantization_config
    )
    packed = [module for module in model_8bit.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == 8
    assert {module.codes.device.type for module in packed} == {"cuda"}
    model_8bit.generate(tiny.inputs("bloom")["input_ids"].cuda(), max_new_tokens=3, do_sample=False)


def test_an_untied_head_on_the_cpu_keeps_fp32(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, torch.float16)
    quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    device_map = {"model": 0, "lm_head": "cpu"}
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, quantization_config=quantization_config
    )
    assert {value.dtype for value in model.lm_head.state_dict().values()} == {torch.float32}
    model.generate(tiny.inputs("llama")["input_ids"].cuda(), max_new_tokens=3, do_sample=False)


def test_bitsandbytes_goes_to_the_gpu_by_itself(small: Path) -> None:
    assert lowbit.AutoModelForCausalLM.from_pretrained(small, load_in_4bit=True).device.type == "cuda"
