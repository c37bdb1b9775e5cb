"""GGUF files through the Auto classes: packed in memory, equal to what they were written from, and written again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gguf_models
import lowbit
from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.gguf.export import write_gguf_model
from lowbit.nn import QuantLinear
from lowbit.nn.embedding import QuantEmbedding, TiedHead
from lowbit.wire.gguf.container import open_gguf
from lowbit.wire.gguf.types import GgmlType

load = lowbit.AutoModelForCausalLM.from_pretrained
IGNORED = {"_name_or_path", "dtype", "quantization_config"}
# Two spellings of the same: what is left out follows from the other numbers.
SPELLED_OTHERWISE = {"mixtral": {"head_dim"}, "falcon": {"num_kv_heads"}}
TEXTS = ["The history of the town of", " don't  stop\n\nnow, 12345!", "<s>x</s> <pad>", ""]


@pytest.fixture(scope="module")
def q4(testbed: Path) -> Path:
    return testbed / "gguf" / "small-Q4_K_M.gguf"


@pytest.fixture
def registered() -> Iterator[None]:
    lowbit.register()
    yield
    lowbit.unregister()


def differences(left: Any, right: Any, kind: str = "") -> dict[str, Any]:
    """Where two configurations differ."""
    a, b = left.to_dict(), right.to_dict()
    names = (set(a) | set(b)) - IGNORED - SPELLED_OTHERWISE.get(kind, set())
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


@pytest.mark.parametrize("kind", gguf_models.MODELS)
def test_every_architecture_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    """Names, rows, norms, transposes and configuration: of fp32 nothing is lost, neither in the file nor in logits."""
    model = gguf_models.save(kind, tmp_path / "dense")
    write_gguf_model(tmp_path / "dense", tmp_path / "model.gguf", "F32")
    read = load(tmp_path, gguf_file="model.gguf")
    assert type(read) is type(model) and not differences(model.config, read.config, kind)
    state = read.state_dict()
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])} == set()
    assert torch.equal(gguf_models.logits(read), gguf_models.logits(model))
    assert not hasattr(read, "hf_quantizer")


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "gemma3", "falcon-new", "phi3", "mixtral", "qwen2moe"])
def test_every_matrix_stays_packed_and_saves(kind: str, tmp_path: Path) -> None:
    gguf_models.save(kind, tmp_path / "dense")
    write_gguf_model(tmp_path / "dense", tmp_path / "model.gguf", "Q8_0")
    model = load(tmp_path / "model.gguf")
    dense = [name for name, entry in model.hf_quantizer.plan.kept.items() if "tied" not in entry.reason]
    assert all(name.endswith(("mlp.gate", "wpe", "shared_expert_gate")) for name in dense)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    outputs = gguf_models.logits(model)
    model.save_pretrained(tmp_path / "packed")
    reloaded = load(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(gguf_models.logits(reloaded), outputs)
    write_gguf_model(tmp_path / "packed", tmp_path / "again.gguf")
    first, again = open_gguf(tmp_path / "model.gguf"), open_gguf(tmp_path / "again.gguf")
    assert first.tensors.keys() == again.tensors.keys()
    assert {name for name in first.tensors if not torch.equal(first.raw(name), again.raw(name))} == set()
    dequantized = load(tmp_path / "model.gguf", quantization_config=lowbit.GgufConfig(dequantize=True))
    torch.testing.assert_close(gguf_models.logits(dequantized), outputs)
    assert not any(isinstance(module, QuantLinear | QuantEmbedding) for module in dequantized.modules())


def test_llama_cpp_file_is_the_small_model(q4: Path, testbed: Path) -> None:
    model = load(q4.parent, gguf_file=q4.name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(testbed / "small", dtype=torch.float32)
    assert not differences(reference.config, model.config)
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        expected = reference(ids).logits
        noise = (model(ids).logits - expected).square().mean().sqrt()
        assert 0 < noise < 0.25 * expected.std()  # 0.18 in llama.cpp's own mixture
        better = load(q4.with_name("small-Q8_0.gguf"))(ids).logits
        assert (better - expected).square().mean().sqrt() < 0.1 * noise
    assert model.generation_config.eos_token_id == 1


def test_embedding_and_head_share_one_table_through_generate(q4: Path) -> None:
    model = load(q4)
    assert isinstance(model.lm_head, TiedHead) and model.lm_head.table is model.model.embed_tokens
    packed = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert model.get_memory_footprint() < q4.stat().st_size
    static = model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False, cache_implementation="static")
    plain = model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(static, plain)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == packed


def test_compiles_without_breaks(q4: Path) -> None:
    model = load(q4)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(ids).logits, expected)


def test_other_dtypes(q4: Path) -> None:
    model = load(q4, dtype=torch.bfloat16)
    assert model(torch.tensor([[3, 4]])).logits.dtype == torch.bfloat16


def test_dequantized_again_the_head_is_tied(q4: Path) -> None:
    model = load(q4)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        packed = model(ids).logits
        dense = model.dequantize()
        torch.testing.assert_close(dense(ids).logits, packed)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    dense.tie_weights()


def test_tokenizer_and_config(q4: Path, testbed: Path) -> None:
    original = transformers.AutoTokenizer.from_pretrained(testbed / "small")
    for tokenizer in (
        lowbit.AutoTokenizer.from_pretrained(q4),
        lowbit.AutoTokenizer.from_pretrained(q4.parent, gguf_file=q4.name),
    ):
        for text in TEXTS:
            assert tokenizer(text).input_ids == original(text).input_ids
            ids = original(text).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
        assert tokenizer.pad_token_id == original.pad_token_id and tokenizer.model_max_length == 1024
    config, unused = lowbit.AutoConfig.from_pretrained(q4, return_unused_kwargs=True, use_cache=False, other=1)
    assert config.use_cache is False and unused == {"other": 1}
    assert lowbit.AutoConfig.from_pretrained(testbed / "small").vocab_size == config.vocab_size
    assert lowbit.AutoTokenizer.from_pretrained(testbed / "small")("a").input_ids == original("a").input_ids


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_on_the_fly_is_what_the_file_holds(kind: str, small: Path, tmp_path: Path) -> None:
    write_gguf_model(small, tmp_path / "model.gguf", kind)
    held = {info.type for info in open_gguf(tmp_path / "model.gguf").tensors.values()}
    assert held == {GgmlType.F32, *([GgmlType.F16] if kind == "F16" else [GgmlType.Q4_K, GgmlType.Q6_K])}
    if kind == "F16":  # plain numbers: nothing would be quantized
        with pytest.raises(PlanError, match="nothing in this model"):
            load(small, quantization_config=lowbit.GgufConfig(type=kind))
        return
    file = load(tmp_path / "model.gguf")
    model = load(small, quantization_config=lowbit.GgufConfig(type=kind), dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert all(layer.quant_tensor().equal(file.get_submodule(name).quant_tensor()) for name, layer in layers.items())
    model.save_pretrained(tmp_path / "packed")
    reloaded = load(tmp_path / "packed", dtype=torch.float32)
    assert reloaded.config.quantization_config.type == kind
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_quantized_checkpoints_become_gguf(small: Path, tmp_path: Path) -> None:
    """To the bit where a type holds the numbers, else only when asked for."""
    config = lowbit.GPTQConfig(bits=4, group_size=32, sym=True)
    load(small, quantization_config=config, dtype=torch.float16).save_pretrained(tmp_path / "gptq")
    write_gguf_model(tmp_path / "gptq", tmp_path / "model.gguf", "Q4_0")
    checkpoint = lowbit.open_checkpoint(tmp_path / "gptq")
    held = lowbit.open_checkpoint(tmp_path / "model.gguf")
    for name, tensor in checkpoint.weights.items():
        assert torch.equal(held.weights[name].dequantize(), tensor.dequantize())
    with pytest.raises(FormatError, match="requantize"):
        write_gguf_model(tmp_path / "gptq", tmp_path / "other.gguf", "Q4_K_M")
    assert not (tmp_path / "other.gguf").exists()
    seen: list[tuple[str, int, int]] = []
    write_gguf_model(
        tmp_path / "gptq", tmp_path / "other.gguf", "Q4_K_M", requantize=True, progress=lambda *now: seen.append(now)
    )
    assert [number for _, number, _ in seen] == list(range(1, seen[0][2] + 1))


@pytest.mark.usefixtures("registered")
def test_plain_transformers_after_register(q4: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(q4.parent, gguf_file=q4.name)
    assert isinstance(model.lm_head, TiedHead)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, load(q4)(ids).logits)
    config = transformers.AutoConfig.from_pretrained(q4.parent, gguf_file=q4.name)
    assert not differences(config, lowbit.AutoConfig.from_pretrained(q4))


def test_what_contradicts_the_file_is_refused(q4: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is quantized already"):
        load(q4, quantization_config=lowbit.GPTQConfig(bits=4))
    with pytest.raises(PlanError, match="type of each weight itself"):
        load(q4, quantization_config=lowbit.GgufConfig(type="Q4_0"))
    with pytest.raises(PlanError, match="holds no file"):
        load(q4.parent, gguf_file="other.gguf")
    with pytest.raises(PlanError, match="give GgufConfig a type"):
        load(small, quantization_config=lowbit.GgufConfig())
    with pytest.raises(FormatError, match="no such mixture"):
        load(small, quantization_config=lowbit.GgufConfig(type="Q4_9"))
    with pytest.raises(PlanError, match="--method gguf:IQ2_XS --dataset FILE"):
        write_gguf_model(small, tmp_path / "x.gguf", "IQ2_XS")
    with pytest.raises(PlanError, match="--method gguf:IQ1_S --dataset FILE"):
        load(small, quantization_config=lowbit.GgufConfig(type="IQ1_S"))
    for wrong in ({"type": 4}, {"modules_to_not_convert": "lm_head"}):
        with pytest.raises(FormatError):
            lowbit.GgufConfig(**wrong)
