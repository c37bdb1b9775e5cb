"""Mixtures of experts: fused in memory, one expert at a time in files, packed in both."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import formats
import lowbit
from lowbit.integrations.convert import Conversion, Target
from lowbit.kernels import ops
from lowbit.nn import QuantExperts, QuantStack
from lowbit.wire.store import read_header

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
EXPERTS = 4


def _mixtral() -> t.PreTrainedModel:
    return t.MixtralForCausalLM(t.MixtralConfig(intermediate_size=96, num_local_experts=EXPERTS, **_SIZES))


def _qwen3_moe() -> t.PreTrainedModel:
    sizes = {"intermediate_size": 96, "moe_intermediate_size": 96, "head_dim": 32, "num_experts_per_tok": 2}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(num_experts=EXPERTS, **sizes, **_SIZES))


def _gpt_oss() -> t.PreTrainedModel:
    model = t.GptOssForCausalLM(
        t.GptOssConfig(intermediate_size=96, head_dim=32, num_local_experts=EXPERTS, pad_token_id=0, **_SIZES)
    )
    experts = model.model.layers[0].mlp.experts
    torch.nn.init.normal_(experts.gate_up_proj_bias)
    torch.nn.init.normal_(experts.down_proj_bias)
    return model


def _llama4() -> t.PreTrainedModel:
    sizes = {"intermediate_size": 96, "intermediate_size_mlp": 96, "head_dim": 32, "pad_token_id": 0}
    return t.Llama4ForCausalLM(t.Llama4TextConfig(num_local_experts=EXPERTS, **sizes, **_SIZES))


MODELS = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "gpt_oss": _gpt_oss, "llama4": _llama4}
MODULES = {
    "mixtral": "model.layers.0.mlp.experts",
    "qwen3_moe": "model.layers.0.mlp.experts",
    "gpt_oss": "model.layers.0.mlp.experts",
    "llama4": "model.layers.0.feed_forward.experts",
}
STORED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.{}.w1",
    "qwen3_moe": "model.layers.0.mlp.experts.{}.gate_proj",
    "gpt_oss": "model.layers.0.mlp.experts.{}.gate_proj",
    "llama4": "model.layers.0.feed_forward.experts.{}.gate_proj",
}
CONFIGS = {
    "nf4": lambda: lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: lowbit.GPTQConfig(bits=4, group_size=32, sym=False),
    "awq": lambda: lowbit.AwqConfig(group_size=32),
}
# All of them take these shapes.
OTHERS = [name for name in formats.CONFIGS if not name.startswith(("bitsandbytes", "gptq", "awq"))]
MARKERS = {"nf4": "weight.absmax", "int8": "SCB", "gptq": "qweight", "awq": "qweight"}
IDS = torch.arange(3, 13)[None]


def save(kind: str, folder: Path) -> t.PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    return model


def load(folder: Path, config: Any = None, **kwargs: Any) -> Any:
    return lowbit.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, **kwargs
    )


@pytest.fixture(scope="module")
def wide_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of shapes that every format holds."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "hidden_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
    folder = tmp_path_factory.mktemp("wide")
    t.MixtralForCausalLM(t.MixtralConfig(intermediate_size=512, num_local_experts=2, **sizes)).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: t.PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_again(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_quantize_save_reload_dequantize(kind: str, method: str, tmp_path: Path) -> None:
    dense = save(kind, tmp_path / "dense")
    model = load(tmp_path / "dense", CONFIGS[method]())
    experts = model.get_submodule(MODULES[kind])
    assert isinstance(experts, QuantExperts) and not list(experts.named_parameters(recurse=False))[2:]
    plan = model.hf_quantizer.plan
    assert plan.shapes[f"{MODULES[kind]}.gate_up_proj"] == (EXPERTS, 192, 64)
    assert {f"{MODULES[kind]}.gate_up_proj", f"{MODULES[kind]}.down_proj"} <= set(plan.quantized)
    outputs = logits(model)
    assert 0 < (outputs - logits(dense)).abs().max() < 1

    model.save_pretrained(tmp_path / "packed")
    names = set(saved(tmp_path / "packed"))
    assert {f"{STORED[kind].format(expert)}.{MARKERS[method]}" for expert in range(EXPERTS)} <= names
    assert not any("gate_up_proj" in name or ".codes" in name for name in names)

    reloaded = load(tmp_path / "packed")
    assert torch.equal(logits(reloaded), outputs)
    assert reloaded.hf_quantizer.plan.quantized == plan.quantized
    reloaded.save_pretrained(tmp_path / "again")
    first, second = saved(tmp_path / "packed"), saved(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    reloaded.dequantize()
    if method != "int8":  # whose activations were rounded too
        torch.testing.assert_close(logits(reloaded), outputs, rtol=0, atol=1e-5)
    reloaded.save_pretrained(tmp_path / "dequantized")
    assert set(saved(tmp_path / "dequantized")) == set(saved(tmp_path / "dense"))
    plain = t.AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized", dtype=torch.float32)
    assert torch.equal(logits(plain), logits(reloaded))


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_format_holds_experts(method: str, wide_mixtral: Path, tmp_path: Path) -> None:
    model = load(wide_mixtral, formats.CONFIGS[method](), device_map="cpu")
    assert {f"{MODULES['mixtral']}.gate_up_proj", f"{MODULES['mixtral']}.down_proj"} <= set(
        model.hf_quantizer.plan.quantized
    )
    model.save_pretrained(tmp_path)
    names = list(saved(tmp_path))
    assert all(any(name.startswith(f"{STORED['mixtral'].format(n)}.") for name in names) for n in range(2))
    reloaded = load(tmp_path)
    stacks = reloaded.get_submodule(MODULES["mixtral"]).stacks
    assert sum(p.nbytes for s in stacks.values() for p in s.packed) <= 1.15 * sum(
        p.nbytes for s in model.get_submodule(MODULES["mixtral"]).stacks.values() for p in s.packed
    )
    assert torch.equal(logits(reloaded), logits(model))
    activation = stacks["up_proj"].spec.activation.kind
    outputs = logits(reloaded)
    reloaded.dequantize()
    torch.testing.assert_close(logits(reloaded), outputs, rtol=0, atol=1e-5 if activation == "none" else 1)


def test_llama4_in_fbgemms_own_layout(tmp_path: Path) -> None:
    """Transformers' module for it has ``gate_up_proj [E, H, 2I]`` and a scale per output, ``down_proj`` likewise."""
    dense = save("llama4", tmp_path / "dense")
    model = load(tmp_path / "dense", lowbit.FbgemmFp8Config())
    module = MODULES["llama4"]
    assert set(model.get_submodule(module).stacks) == {"gate_up_proj", "down_proj"}
    model.save_pretrained(tmp_path / "packed")
    tensors = saved(tmp_path / "packed")
    layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if name.startswith(f"{module}.")}
    assert layout == {
        f"{module}.gate_up_proj": ((EXPERTS, 64, 192), torch.float8_e4m3fn),
        f"{module}.gate_up_proj_scale": ((EXPERTS, 1, 192), torch.float32),
        f"{module}.down_proj": ((EXPERTS, 96, 64), torch.float8_e4m3fn),
        f"{module}.down_proj_scale": ((EXPERTS, 64, 1), torch.float32),
    }
    decoded = tensors[f"{module}.gate_up_proj"].float() * tensors[f"{module}.gate_up_proj_scale"]
    torch.testing.assert_close(decoded, dense.get_submodule(module).gate_up_proj.detach(), rtol=0.07, atol=1e-3)
    reloaded = load(tmp_path / "packed")
    assert torch.equal(logits(reloaded), logits(model))
    reloaded.dequantize()
    assert torch.equal(reloaded.get_submodule(module).gate_up_proj, decoded)


@pytest.mark.parametrize("original", [True, False])
def test_headers_name_modules_as_the_files_do(original: bool, tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense")
    model = load(tmp_path / "dense", lowbit.TorchAoConfig("int8_weight_only"))
    model.save_pretrained(tmp_path / "packed", save_original_format=original)
    _, header = read_header(tmp_path / "packed" / "model.safetensors")
    named = {name for name in header if "experts" in name}
    assert len(named) == 3 * EXPERTS and all(("block_sparse_moe" in name) == original for name in named)
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))


@pytest.mark.parametrize("kind", MODELS)
def test_each_expert_is_quantized_for_itself(kind: str, tmp_path: Path) -> None:
    dense = save(kind, tmp_path)
    model = load(tmp_path, CONFIGS["nf4"]())
    experts, original = model.get_submodule(MODULES[kind]), dense.get_submodule(MODULES[kind])
    algorithm = model.hf_quantizer.recipe.algorithm
    projection = experts.projections["gate_up_proj"]
    for part, matrices in projection.split(original.gate_up_proj.detach()).items():
        for number, matrix in enumerate(matrices):
            found = experts.stacks[part].quant_tensor(number)
            assert found.equal(algorithm.quantize(matrix.contiguous(), found.spec))
    assert torch.equal(
        projection.join(projection.split(original.gate_up_proj.detach())), original.gate_up_proj.detach()
    )


@pytest.mark.parametrize("kind", MODELS)
def test_one_graph_and_the_gradients_of_dense_experts(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    model = load(tmp_path, CONFIGS["gptq"]())
    packed = model.get_submodule(MODULES[kind])
    dense = copy.deepcopy(packed).unpack()
    rows = torch.randn(8, 64, requires_grad=True)
    chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in rows])
    weights = torch.rand(8, 2, requires_grad=True)
    inputs = (rows,) if kind == "llama4" else (rows, chosen, weights)

    def run(module: Any) -> tuple[torch.Tensor, ...]:
        outputs = module(*inputs)
        return outputs, *torch.autograd.grad(outputs.square().sum(), [x for x in inputs if x.is_floating_point()])

    expected = run(dense)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    eager = torch.compile(packed, fullgraph=True, backend="eager")
    for module in (packed, compiled, eager):
        torch.testing.assert_close(run(module), expected, rtol=1e-4, atol=1e-4)


def test_biases_of_packed_experts_can_be_trained(tmp_path: Path) -> None:
    save("gpt_oss", tmp_path)
    packed = load(tmp_path, CONFIGS["gptq"]()).get_submodule(MODULES["gpt_oss"])
    dense = copy.deepcopy(packed).unpack()
    rows, chosen, weights = torch.randn(6, 64), torch.tensor([[0, 2]] * 6), torch.rand(6, 2)
    gradients = []
    for module in (packed, dense):
        module.gate_up_proj_bias.requires_grad_()
        gradients += torch.autograd.grad(module(rows, chosen, weights).square().sum(), [module.gate_up_proj_bias])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_generation_with_a_static_cache(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    model = load(tmp_path, CONFIGS["nf4"]())
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **arguments)
    assert torch.equal(model.generate(IDS, cache_implementation="static", disable_compile=True, **arguments), plain)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, logits(model))


class _Largest(TorchDispatchMode):
    """Remembers how large the largest tensor was that anything made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        views = ("aten::select", "aten::slice", "aten::view", "aten::reshape", "aten::transpose", "aten::t")
        if isinstance(made, torch.Tensor) and not func.name().startswith(views):
            self.elements = max(self.elements, made.numel())
        return made


def test_experts_stay_packed_while_they_run(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    model = load(tmp_path, CONFIGS["gptq"]())
    before = model.get_memory_footprint()
    model.generate(IDS, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert model.get_memory_footprint() == before
    tensors = [*model.parameters(), *model.buffers()]
    assert before == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    stack = model.get_submodule(MODULES["qwen3_moe"]).stacks["gate_proj"]
    held = sum(tensor.nbytes for tensor in stack.packed)
    assert held == EXPERTS * stack.quant_tensor(0).nbytes < EXPERTS * 96 * 64
    with _Largest() as largest:
        ops._expert_linear(
            torch.randn(8, 64), torch.arange(8) % EXPERTS, stack.packed, None, stack.spec_key, stack.kernel, 96
        )
    assert largest.elements <= 96 * 64


@pytest.mark.parametrize("method", ["nf4", "gptq"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_placement_offloading_and_saving(kind: str, method: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "dense")
    model = load(tmp_path / "dense", CONFIGS[method]())
    model.save_pretrained(tmp_path / "packed")
    expected = logits(model)
    rest = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    for source, config in (("packed", None), ("dense", CONFIGS[method]())):
        device_map = {**dict.fromkeys(rest, "cpu"), "model.layers.0": "disk"}
        offloaded = load(tmp_path / source, config, device_map=device_map, offload_folder=tmp_path / "offload")
        assert torch.equal(logits(offloaded), expected)
        offloaded.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), expected)
        offloaded.dequantize()
        torch.testing.assert_close(logits(offloaded), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(load(tmp_path / "dense", CONFIGS[method](), device_map="auto")), expected)


def test_automatic_placement_counts_experts_as_packed(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    quantizer = load(tmp_path, CONFIGS["gptq"]()).hf_quantizer
    model = MODELS["mixtral"]()
    name = f"{MODULES['mixtral']}.gate_up_proj"
    assert quantizer.param_needs_quantization(model, name)
    size = quantizer.param_element_size(model, name, model.get_parameter(name))
    # 4 bits, and per group of 32 an fp16 scale and a zero point, whose row of 2 takes a byte
    assert size == 0.5 + 2 / 32 + 1 / 64


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_copy_pickle_and_cast(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    model = load(tmp_path, CONFIGS["gptq"]())
    outputs = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), outputs)
        stack = other.get_submodule(MODULES[kind]).stacks["down_proj"]
        stack.packed[0].zero_()
        assert not torch.equal(logits(other), outputs) and torch.equal(logits(model), outputs)
    experts = copy.deepcopy(model.get_submodule(MODULES[kind])).to(torch.bfloat16)
    assert [tensor.dtype for tensor in experts.stacks["up_proj"].packed] == [torch.uint8, torch.float16, torch.uint8]
    rows = torch.randn(2, 64, dtype=torch.bfloat16)
    assert experts(rows, torch.tensor([[0, 1]] * 2), torch.ones(2, 2).bfloat16()).dtype is torch.bfloat16


def test_experts_that_the_user_skips_stay_dense(tmp_path: Path) -> None:
    dense = save("mixtral", tmp_path / "dense")
    config = lowbit.GPTQConfig(bits=4, group_size=32, modules_to_not_convert=["down_proj"])
    model = load(tmp_path / "dense", config)
    plan = model.hf_quantizer.plan
    assert plan.kept[f"{MODULES['mixtral']}.down_proj"].reason == "skipped by 'down_proj'"
    experts = model.get_submodule(MODULES["mixtral"])
    assert torch.equal(experts.down_proj, dense.get_submodule(MODULES["mixtral"]).down_proj)
    model.save_pretrained(tmp_path / "packed")
    names = set(saved(tmp_path / "packed"))
    assert {f"model.layers.0.block_sparse_moe.experts.3.{name}" for name in ("w1.qweight", "w2.weight")} <= names
    reloaded = load(tmp_path / "packed")
    assert torch.equal(logits(reloaded), logits(model))
    assert reloaded.hf_quantizer.plan.quantized == plan.quantized
    reloaded.dequantize()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=1e-5)

    everything = load(tmp_path / "dense", lowbit.GPTQConfig(bits=4, group_size=32, modules_to_not_convert=["experts"]))
    assert type(everything.get_submodule(MODULES["mixtral"])).__name__ == "MixtralExperts"


def test_what_a_format_cannot_hold_stays_dense_with_its_reason(tmp_path: Path) -> None:
    save("gpt_oss", tmp_path / "dense")
    model = load(tmp_path / "dense", lowbit.AwqConfig(group_size=64))
    plan = model.hf_quantizer.plan
    assert plan.kept[f"{MODULES['gpt_oss']}.down_proj"].reason == "groups of 64 don't divide 96 inputs"
    assert plan.kept["model.layers.0.mlp.router"].reason == "GptOssTopKRouter is not a linear layer"
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["modules_to_not_convert"] == [f"{MODULES['gpt_oss']}.down_proj"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_names_that_quantizing_libraries_give_to_experts(method: str, tmp_path: Path) -> None:
    """GPTQModel writes the names of its own module tree; a base model's file has no prefix."""
    spellings = {
        "mixtral": {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."},
        "qwen3_moe": {".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},
    }
    for kind, changes in spellings.items():
        save(kind, tmp_path / "dense")
        model = load(tmp_path / "dense", CONFIGS[method]())
        model.save_pretrained(tmp_path / "packed")
        renamed = {}
        for name, tensor in saved(tmp_path / "packed").items():
            for old, new in changes.items():
                name = name.replace(old, new)
            renamed[name] = tensor
        save_again(renamed, tmp_path / "packed")
        reloaded = load(tmp_path / "packed")
        assert torch.equal(logits(reloaded), logits(model))
        reloaded.save_pretrained(tmp_path / "again")
        assert saved(tmp_path / "again").keys() == renamed.keys()


def test_a_file_of_the_base_model(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "dense")
    model = load(tmp_path / "dense", CONFIGS["nf4"]())
    model.save_pretrained(tmp_path / "packed")
    tensors = {name.removeprefix("model."): tensor for name, tensor in saved(tmp_path / "packed").items()}
    save_again(tensors, tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
    base = lowbit.AutoModel.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert any(isinstance(module, QuantStack) for module in base.modules())


def test_act_order_of_some_experts(tmp_path: Path) -> None:
    """The first expert's groups are in order, which its tensors alone don't say differently from no act-order."""
    save("mixtral", tmp_path / "dense")
    load(tmp_path / "dense", CONFIGS["gptq"]()).save_pretrained(tmp_path / "packed")
    tensors = saved(tmp_path / "packed")
    for expert in range(1, EXPERTS):
        name = f"{STORED['mixtral'].format(expert)}.g_idx"
        tensors[name] = tensors[name].flip(0)
    save_again(tensors, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "packed")
    stack = model.get_submodule(MODULES["mixtral"]).stacks["gate_proj"]
    assert stack.spec.grouping.permuted
    checkpoint = lowbit.open_checkpoint(tmp_path / "packed")
    for expert in range(EXPERTS):
        expected = checkpoint.weights[STORED["mixtral"].format(expert)].dequantize()
        assert torch.equal(stack.quant_tensor(expert).dequantize(), expected)
    model.save_pretrained(tmp_path / "again")
    again = saved(tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_inspect_shows_experts(tmp_path: Path) -> None:
    from lowbit.cli.inspect import describe

    save("mixtral", tmp_path / "dense")
    load(tmp_path / "dense", CONFIGS["gptq"]()).save_pretrained(tmp_path / "packed")
    report, plan = describe(tmp_path / "packed")
    assert len([weight for weight in report["weights"] if ".experts." in weight["name"]]) == 3 * EXPERTS
    assert "block_sparse_moe.experts.*.w1 (4)" in str(plan)


# PEFT calls by names that Transformers has changed.
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_adapters_beside_packed_experts(tmp_path: Path) -> None:
    """Gradients go through packed experts; PEFT says itself that it can't adapt them."""
    peft = pytest.importorskip("peft")
    save("qwen3_moe", tmp_path)
    model = load(tmp_path, CONFIGS["nf4"]())
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        adapted = peft.get_peft_model(model, config)
    loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(gradients) == 2 and all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_conversion_keeps_experts_apart_and_fuses_what_dense_files_hold_fused(kind: str, tmp_path: Path) -> None:
    dense = save(kind, tmp_path / "dense")
    model = load(tmp_path / "dense", CONFIGS["gptq"]())
    model.save_pretrained(tmp_path / "gptq")
    for target in ("awq", "dense"):
        conversion = Conversion(lowbit.open_checkpoint(tmp_path / "gptq"), Target.parse(target))
        conversion.prepare()
        folder = tmp_path / f"to-{target}"
        folder.mkdir()
        conversion.run(folder)
    assert torch.equal(logits(load(tmp_path / "to-awq")), logits(model))
    assert saved(tmp_path / "to-dense").keys() == saved(tmp_path / "dense").keys()
    plain = t.AutoModelForCausalLM.from_pretrained(tmp_path / "to-dense", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    assert type(plain) is type(dense)


def test_experts_that_a_format_keeps_fused_are_not_converted_in_silence(tmp_path: Path) -> None:
    save("llama4", tmp_path / "dense")
    load(tmp_path / "dense", lowbit.FbgemmFp8Config()).save_pretrained(tmp_path / "packed")
    conversion = Conversion(lowbit.open_checkpoint(tmp_path / "packed"), Target.parse("dense"))
    with pytest.raises(lowbit.PlanError, match=r"experts\..*_proj_scale' belongs to experts that .* keeps fused"):
        conversion.prepare()
