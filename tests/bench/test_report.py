"""What a report says against the definitions, the record that it reads, and the page as a browser sees it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.bench.report import BlockRecord, Kept, Measured, Record, Report, collect, read_record, render
from lowbit.bench.report.charts import Heatmap
from lowbit.bench.report.figures import DENSE, FIGURES
from lowbit.bench.report.insights import insights
from lowbit.bench.report.markup import Markup, brief, duration, escape, number, percent, shortened, size, tag
from lowbit.bench.report.metrics import STEPS, Scale
from lowbit.bench.report.places import places
from lowbit.errors import FormatError, PlanError
from lowbit.wire import open_checkpoint
from pages import Page, layers, names, report

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(1)>" onload="alert(1)'
COMPLETE = {
    "version": 1,
    "method": "gptq",
    "format": "gptq",
    "model": "small",
    "seconds": 12.5,
    "versions": {"torch": "2.13.0"},
    "calibration": {"description": "calib.txt", "tokens": 131072, "samples": 128, "length": 1024, "seed": 20240611},
    "settings": {"bits": 4, "desc_act": True, "stages": ["q", "k"]},
    "layers": [
        {
            "name": "model.layers.0.self_attn.q_proj",
            "block": 0,
            "shape": [256, 256],
            "spec": "uint4, groups of 64",
            "bits_per_weight": 4.3,
            "weight_error": 0.02,
            "output_error": 0.01,
            "input_error": None,
            "damp": 0.01,
            "seconds": 0.3,
            "tokens": 131072,
            "notes": ["dead columns: 3"],
            "input_kurtosis": 12.0,
            "input_max_over_rms": 40.0,
        }
    ],
    "blocks": [{"block": 0, "output_error": 0.001, "seconds": 3.1}],
    "notes": ["one block was resumed"],
}


@pytest.fixture(scope="module")
def quantized(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 4 bits, rounded to nearest."""
    folder = tmp_path_factory.mktemp("report") / "small-4bit"
    config = lowbit.GPTQConfig(bits=4, group_size=64, sym=False)
    lowbit.AutoModelForCausalLM.from_pretrained(small, quantization_config=config, dtype="auto").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(quantized: Path, small: Path) -> Report:
    return collect(quantized, small)


def with_record(folder: Path, source: Path, data: object) -> Path:
    """A copy of a checkpoint (by links) with a record."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "quantization_report.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------------------- figures


def test_errors_and_outliers_are_what_their_definitions_say(found: Report, quantized: Path, small: Path) -> None:
    dense, checkpoint = load_file(small / "model.safetensors"), open_checkpoint(quantized)
    assert len(found.layers) == 28
    for layer in found.layers:
        weight = dense[f"{layer.name}.weight"].double()
        difference = checkpoint.weights[layer.name].dequantize().double() - weight
        assert layer.weight_error == pytest.approx(float(difference.square().sum() / weight.square().sum()), rel=1e-5)
        assert layer.max_over_rms == pytest.approx(float(weight.abs().max() / weight.square().mean().sqrt()), rel=1e-5)
        centred = weight - weight.mean()
        kurtosis = float(centred.pow(4).mean() / centred.square().mean() ** 2)
        assert layer.kurtosis == pytest.approx(kurtosis, rel=1e-4)
        assert layer.spec == str(checkpoint.weights[layer.name].spec)


def test_every_stored_byte_is_counted_once(found: Report, quantized: Path) -> None:
    file = quantized / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    stored = sum(layer.stored_bytes for layer in found.layers) + sum(kept.stored_bytes for kept in found.kept)
    assert stored == file.stat().st_size - header
    assert found.file_bytes == file.stat().st_size
    layer = found.layers[0]
    parts = [tensor for name, tensor in load_file(file).items() if name.rpartition(".")[0] == layer.name]
    assert layer.bits == 8 * sum(tensor.nbytes for tensor in parts) / layer.count


def test_what_was_before_is_the_reference_or_16_bits(found: Report, quantized: Path, small: Path) -> None:
    assert found.before == (small / "model.safetensors").stat().st_size
    alone = collect(quantized)
    assert alone.before == 2 * alone.parameters
    model = transformers.AutoModelForCausalLM.from_pretrained(small)
    assert alone.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_without_a_reference_outliers_are_those_of_the_quantized_weights(quantized: Path) -> None:
    alone = collect(quantized)
    weight = open_checkpoint(quantized).weights[alone.layers[0].name].dequantize()
    assert alone.layers[0].weight_error is None
    assert alone.layers[0].max_over_rms == pytest.approx(float(weight.abs().max() / weight.square().mean().sqrt()))


def test_a_strip_of_rows_at_a_time_gives_the_same(
    found: Report, quantized: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.bench.report.contents._STRIP", 5000)
    for whole, parts in zip(found.layers, collect(quantized, small).layers, strict=True):
        assert parts.weight_error == pytest.approx(whole.weight_error, rel=1e-6)
        assert parts.kurtosis == pytest.approx(whole.kurtosis, rel=1e-6)
        assert parts.max_over_rms == pytest.approx(whole.max_over_rms, rel=1e-6)


def test_progress_reaches_the_number_of_weights(quantized: Path) -> None:
    steps: list[int] = []
    collect(quantized, advance=steps.append)
    assert steps == [1] * len(open_checkpoint(quantized).weights)


def test_a_zero_weight_has_no_relative_error_and_no_outliers(quantized: Path, small: Path, tmp_path: Path) -> None:
    changed = changed_reference(tmp_path, small, lambda name, tensor: tensor * (name != Q_PROJ))
    layer = next(layer for layer in collect(quantized, changed).layers if f"{layer.name}.weight" == Q_PROJ)
    assert layer.weight_error is None
    assert layer.max_over_rms == 0


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def changed_reference(folder: Path, small: Path, change: Any) -> Path:
    """The embedded model with each tensor changed; None leaves one out."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(small / "model.safetensors").items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_bytes((small / "config.json").read_bytes())
    return folder


def test_scales_moved_into_norms_make_weights_incomparable(quantized: Path, small: Path, tmp_path: Path) -> None:
    moved = changed_reference(tmp_path, small, lambda name, tensor: tensor * (1.5 if "norm" in name else 1))
    compared = collect(quantized, moved)
    assert not compared.comparable
    assert {layer.weight_error for layer in compared.layers} == {None}
    assert "The norms differ from those of" in render(compared)


def test_norms_in_another_dtype_are_the_same_norms(quantized: Path, small: Path, tmp_path: Path) -> None:
    halves = changed_reference(tmp_path, small, lambda name, tensor: tensor.half())
    assert collect(quantized, halves).comparable


def test_what_the_reference_lacks_is_said(quantized: Path, small: Path, tmp_path: Path) -> None:
    partial = changed_reference(tmp_path, small, lambda name, tensor: None if name == Q_PROJ else tensor)
    compared = collect(quantized, partial)
    assert compared.missing == (Q_PROJ.removesuffix(".weight"),)
    assert "The reference has no weight of its own for model.layers.0.self_attn.q_proj;" in Page(render(compared)).text


def test_refuses_another_model_as_reference(quantized: Path, small: Path, tmp_path: Path) -> None:
    cut = changed_reference(tmp_path, small, lambda name, tensor: tensor[:128] if name == Q_PROJ else tensor)
    with pytest.raises(PlanError, match=r"q_proj.weight' is \[128, 256\] in .* and \[256, 256\] in the checkpoint"):
        collect(quantized, cut)


def test_refuses_a_quantized_reference(quantized: Path) -> None:
    with pytest.raises(PlanError, match=r"is quantized itself \(gptq\); give the dense model"):
        collect(quantized, quantized)


def test_refuses_a_dense_checkpoint(small: Path) -> None:
    with pytest.raises(FormatError, match="the checkpoint is not quantized"):
        collect(small)


def test_gguf_files(testbed: Path) -> None:
    compared = collect(testbed / "gguf" / "small-Q4_K_M.gguf", testbed / "small")
    inside = [layer for layer in compared.layers if layer.place.block is not None]
    assert compared.format == "gguf"
    assert compared.model["architecture"] == "LlamaForCausalLM"
    # What docs/quality.md has for Q4_K_M, in the mixture of a model of four blocks.
    assert 4.5 <= 8 * sum(layer.stored_bytes for layer in inside) / sum(layer.count for layer in inside) <= 6.6
    assert all(layer.weight_error is not None and 1e-5 < layer.weight_error < 0.01 for layer in inside)
    assert compared.file_bytes == (testbed / "gguf" / "small-Q4_K_M.gguf").stat().st_size
    Page(render(compared))


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    quantization = lowbit.GPTQConfig(bits=4, group_size=32, sym=False)
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", quantization_config=quantization)
    model.save_pretrained(tmp_path / "packed")
    compared = collect(tmp_path / "packed", tmp_path / "gpt2")
    assert not compared.missing
    assert compared.layers
    assert all(layer.weight_error is not None and 1e-4 < layer.weight_error < 0.02 for layer in compared.layers)


# -------------------------------------------------------------------------------------------------------------- record


def test_a_record_joins_its_layers(quantized: Path, small: Path, tmp_path: Path) -> None:
    folder = with_record(tmp_path / "with", quantized, COMPLETE)
    alone, compared = collect(folder), collect(folder, small)
    layer = alone.layers[0]
    assert layer.record is not None
    assert (layer.weight_error, layer.record.output_error, layer.record.tokens) == (0.02, 0.01, 131072)
    assert compared.layers[0].weight_error == pytest.approx(collect(quantized, small).layers[0].weight_error)
    assert alone.blocks == (BlockRecord(0, 0.001, 3.1),)
    text = Page(render(alone)).text
    for part in ("calib.txt", "131,072", "20240611", "one block was resumed", "dead columns: 3", "desc act", "40.0"):
        assert part in text, part


def test_without_a_record(quantized: Path, tmp_path: Path) -> None:
    assert read_record(quantized) is None
    folder = with_record(tmp_path / "with", quantized, {})
    assert read_record(folder) == Record()
    Page(render(collect(folder)))


@pytest.mark.parametrize("part", [key for key in COMPLETE if key != "version"])
def test_every_part_of_a_record_is_optional(part: str, tmp_path: Path) -> None:
    (tmp_path / "quantization_report.json").write_text(json.dumps({k: v for k, v in COMPLETE.items() if k != part}))
    record = read_record(tmp_path)
    assert record is not None
    assert getattr(record, part) == getattr(Record(), part)


def _changed(path: str, value: object) -> dict[str, Any]:
    data: Any = json.loads(json.dumps(COMPLETE))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = data
    for part in parents:
        target = target[part]
    target[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("version", 2, "another version"),
        ("version", "1", "version"),
        ("method", 4, "method"),
        ("seconds", "long", "seconds"),
        ("seconds", True, "seconds"),
        ("seconds", math.nan, "seconds"),
        ("seconds", -1, "seconds"),
        ("seconds", 10**400, "seconds"),
        ("versions", [], "versions"),
        ("calibration", "calib.txt", "calibration"),
        ("layers", {}, "layers"),
        ("layers.0", 7, r"layers\[0\]"),
        ("layers.0.name", None, r"layers\[0\].name"),
        ("layers.0.name", "", r"layers\[0\].name"),
        ("layers.0.block", -1, r"layers\[0\].block"),
        ("layers.0.block", 1.5, r"layers\[0\].block"),
        ("layers.0.shape", [1, "2"], r"layers\[0\].shape"),
        ("layers.0.spec", ["uint4"], r"layers\[0\].spec"),
        ("layers.0.weight_error", math.inf, r"layers\[0\].weight_error"),
        ("layers.0.output_error", "0.1", r"layers\[0\].output_error"),
        ("layers.0.tokens", 1e5, r"layers\[0\].tokens"),
        ("layers.0.notes", "a note", r"layers\[0\].notes"),
        ("layers.0.notes", [3], r"layers\[0\].notes"),
        ("blocks.0.block", None, r"blocks\[0\].block"),
        ("blocks.0.output_error", [], r"blocks\[0\].output_error"),
        ("notes", [None], "notes"),
    ],
)
def test_a_wrong_field_of_a_record_is_named(path: str, value: object, named: str, tmp_path: Path) -> None:
    (tmp_path / "quantization_report.json").write_text(json.dumps(_changed(path, value)), encoding="utf-8")
    with pytest.raises(FormatError, match=named) as raised:
        read_record(tmp_path)
    assert "quantization_report.json" in str(raised.value)
    assert "found" in str(raised.value)
    assert "expected" in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_record_that_is_no_object(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "quantization_report.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"quantization_report\.json"):
        read_record(tmp_path)


# -------------------------------------------------------------------------------------------------------------- places


def test_places_of_a_llama() -> None:
    found = places(["lm_head", "model.layers.10.mlp.down_proj", "model.layers.2.self_attn.q_proj"])
    assert list(found) == ["model.layers.2.self_attn.q_proj", "model.layers.10.mlp.down_proj", "lm_head"]
    assert [(place.stack, place.block, place.kind) for place in found.values()] == [
        ("model.layers", 2, "q_proj"),
        ("model.layers", 10, "down_proj"),
        ("", None, "lm_head"),
    ]


def test_kinds_are_told_apart_by_as_many_words_as_that_takes() -> None:
    block = "model.layers.3.mlp"
    found = places([f"{block}.experts.7.up_proj", f"{block}.experts.11.up_proj", f"{block}.shared_expert.up_proj"])
    kinds = {name: (place.kind, place.expert) for name, place in found.items()}
    assert kinds == {
        f"{block}.experts.7.up_proj": ("experts up_proj", 7),
        f"{block}.experts.11.up_proj": ("experts up_proj", 11),
        f"{block}.shared_expert.up_proj": ("shared_expert up_proj", None),
    }


def test_numbers_that_are_no_experts_belong_to_the_kind() -> None:
    path = "decoder.block.1.layer"
    found = places([f"{path}.0.SelfAttention.q", f"{path}.1.EncDecAttention.q", f"{path}.2.DenseReluDense.wi_0"])
    assert [place.kind for place in found.values()] == ["SelfAttention q", "EncDecAttention q", "wi_0"]


@pytest.mark.parametrize("name", ["", ".", "...", "0", "a.0", "a..0.b", "99999999999999999999.x", "a.٣.b", "x" * 5000])
def test_strange_names_have_a_place(name: str) -> None:
    assert set(places([name])) == {name}


# ---------------------------------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("found", [[0.0], [1.0], [0.0, 0.0], [1e-9, 1.0, 2.0], [5.0, 5.0001], [0.0, 1e-300], [1e30]])
def test_scales_stay_between_their_ends(found: list[float], logarithmic: bool) -> None:
    scale = Scale.over(found, logarithmic)
    for each in (scale, scale.widened()):
        assert all(0 <= each.position(value) <= 1 for value in [*found, 0.0, 1e300])
        assert all(0 <= each.step(value) < STEPS for value in found)
        assert all(each.low * 0.99 <= tick <= each.high * 1.01 for tick in each.ticks())
        assert 1 <= len(each.ticks()) <= 9


def test_one_layer_without_loss_leaves_colours_to_the_others() -> None:
    scale = Scale.over([1e-12, 0.01, 0.02, 0.04], logarithmic=True)
    assert scale.low == pytest.approx(0.01 / 1000, rel=1.1)
    assert scale.step(0.04) > scale.step(0.01)


def test_layers_that_hardly_differ_have_colours_that_hardly_differ() -> None:
    scale = Scale.over([0.0100, 0.0101], logarithmic=True).widened()
    assert scale.step(0.0101) - scale.step(0.0100) <= 1
    assert Scale.over([4.1, 4.3], logarithmic=False).widened().step(4.3) < STEPS - 1


def test_experts_share_a_cell_that_names_their_worst() -> None:
    of = layers([f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(4)])
    heatmap = Heatmap.of(of)
    assert len(heatmap.cells) == 1
    page = Page(render(report(of)))
    assert (
        "model.layers.0.mlp.experts.*.up_proj (4 experts): 0.250 % on average, 0.400 % at most" in page.texts["title"]
    )


def test_a_block_of_an_absurd_number_draws_no_map() -> None:
    page = Page(render(report(layers(["model.layers.0.q_proj", "model.layers.99999.q_proj"]))))
    assert not page.all("svg", id="heat")
    assert len(page.all("tr")) == 3


def test_figures_are_those_of_the_committed_results() -> None:
    results = json.loads((REPOSITORY / "benchmarks/results/quality_base_nvidia_h200.json").read_text(encoding="utf-8"))
    rows = results["rows"]
    assert rows["dense"]["perplexity"] == DENSE
    for figure in FIGURES:
        assert (figure.bits, figure.perplexity) == (rows[figure.row]["bits_per_weight"], rows[figure.row]["perplexity"])


def test_numbers_are_written_for_people() -> None:
    assert [number(value) for value in (0, 1.0, 0.01234, 1234.5, 12, 1e-7, 3.21e9, -2.5, math.nan, math.inf)] == [
        *("0", "1.00", "0.0123", "1,234", "12.0", "1.00e-7", "3.21e9", "−2.50", "–", "–")
    ]
    assert [size(value) for value in (0, 999, 1000, 21_650_000, 1.4e12)] == [
        *("0 bytes", "999 bytes", "1.00 kB", "21.6 MB", "1.40 TB")
    ]
    assert [duration(value) for value in (0.312, 119, 150, 8000)] == ["0.312 s", "119 s", "2 min", "2 h 13 min"]
    assert percent(0.0103) == "1.03 %"
    assert [brief(text) for text in ("5.00 %", "0.30", "100", "1.50", "1,000")] == ["5 %", "0.3", "100", "1.5", "1,000"]


def test_long_names_lose_their_middle() -> None:
    text = shortened("a" * 500 + "b" * 500)
    assert len(text) <= 160
    assert text.startswith("aaa")
    assert text.endswith("bbb")


# ------------------------------------------------------------------------------------------------------------- the page


def everything() -> Report:
    """A report that has every part."""
    of = layers(names(80))
    blocks = tuple(BlockRecord(block, 0.001 * (block + 1), 3.0) for block in range(80))
    record = Record("gptq", "gptq", "base", 60.0, {"torch": "2"}, {"tokens": 1}, {"bits": 4}, notes=("a note",))
    kept = (Kept("lm_head.weight", (8192, 512), "BF16"), Kept("model.norm.weight", (512,), "BF16"))
    measured = Measured("text.txt", 8, 1024, 25.9, 24.8, 0.049, 0.001, 0.91)
    return report(of, record=record, blocks=blocks, kept=kept, measured=measured, reference="base", dense_bytes=10**9)


@functools.cache
def complete_page() -> str:
    return render(everything())


def test_a_page_is_complete_and_loads_nothing(found: Report) -> None:
    for source in (render(found), complete_page()):
        page = Page(source)
        assert source.startswith('<!doctype html>\n<html lang="en">')
        assert page.all("meta", charset="utf-8")
        assert not {"link", "img", "iframe", "object", "embed", "form", "base", "image", "use"} & {
            name for name, _ in page.elements
        }
        for name, attributes in page.elements:
            assert "src" not in attributes
            assert "style" not in attributes
            assert not [key for key in attributes if key.startswith("on")], (name, attributes)
            assert (attributes.get("href") or "#").startswith("#")
        assert "@import" not in source
        assert "url(" not in source.replace("createObjectURL(", "").replace("revokeObjectURL(", "")
        assert not re.search(r"https?:", source)


def test_the_policy_allows_the_one_script_and_the_one_style() -> None:
    page = Page(complete_page())
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    for name, text in (("script", page.texts["script"][-1]), ("style", page.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none';")


def test_a_page_for_eighty_blocks_stays_small() -> None:
    source = complete_page()
    assert len(source.encode()) < 1_000_000
    page = Page(source)
    assert len(page.all("tr")) == 1 + 560 + 1 + 2
    assert len([found for found in page.all("rect") if re.fullmatch(r"h[0-8]", found["class"] or "")]) == 560 + STEPS


def test_a_page_for_thousands_of_experts_stays_small() -> None:
    kinds = tuple(f"mlp.experts.{expert}.{kind}" for expert in range(128) for kind in ("gate_proj", "down_proj"))
    source = render(report(layers(names(24, kinds))))
    assert len(source.encode()) < 1_000_000
    assert len(Page(source).all("tr")) == 1 + 48


def test_everything_drawn_has_a_name() -> None:
    source = complete_page()
    page = Page(source)
    assert all(found.get("aria-label") or found.get("aria-hidden") for found in page.all("svg"))
    circles = source.count("<circle")
    assert circles > 500
    assert len(re.findall(r"<circle[^>]*><title>", source)) == circles
    assert all(found.get("scope") for found in page.all("th"))
    assert all(found.get("type") == "button" for found in page.all("button"))
    assert {found["aria-label"] for found in page.all("section")} >= {"Layers", "Block by block", "What stands out"}


def test_ids_are_unique() -> None:
    ids = [attributes["id"] for _, attributes in Page(complete_page()).elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_without_a_script_everything_is_there_but_the_tools() -> None:
    page = Page(complete_page())
    assert all("hidden" in found for found in page.all("div", **{"class": "tools"}) + page.all("button", id="theme"))
    assert "model.layers.79.mlp.down_proj" in page.text


@pytest.mark.parametrize(
    "hostile", [HOSTILE, "<!--", "]]>", "&lt;b&gt;", "\ud800\u202e\x00name", "${alert(1)}", "a" * 10**5]
)
def test_hostile_names_are_text(hostile: str) -> None:
    name = f"model.layers.0.{hostile.replace('.', '_')}"
    of = layers([name, "model.layers.0.mlp.up_proj"], spec=hostile)
    record = Record(
        hostile, hostile, hostile, 1.0, {hostile: hostile}, {hostile: [hostile]}, {hostile: 1}, notes=(hostile,)
    )
    kept = (Kept(f"{hostile}.weight", (4, 4), "BF16"),)
    measured = Measured(hostile, 1, 8, 20.0, 19.0)
    source = render(
        report(of, name=hostile, format=hostile, model={"architecture": hostile}, record=record, kept=kept)
        if hostile == "<!--"
        else report(of, name=hostile, model={"architecture": hostile}, record=record, kept=kept, measured=measured)
    )
    assert len(source.encode("utf-8")) < 500_000
    page = Page(source)
    plain = Page(render(report(layers(["model.layers.0.x", "model.layers.0.mlp.up_proj"]))))
    assert {name for name, _ in page.elements} <= {name for name, _ in plain.elements} | {
        "dl",
        "dt",
        "dd",
        "h3",
        "details",
    }
    assert len(page.all("script")) == 2
    assert json.loads(page.texts["script"][0])["names"]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert "\u202e" not in source


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert tag("p", "<b>", Markup("<i></i>"), [None, "&"], title='"', hidden=True, id=None) == (
        '<p title="&quot;" hidden>&lt;b&gt;<i></i>&amp;</p>'
    )
    assert escape("a\x00\u202e\ud800b") == "a\ufffd\ufffd\ufffdb"


def test_insights_name_what_is_far_from_the_rest() -> None:
    of = list(layers(names(4), recorded=False, weight_error=0.01))
    of[3] = layers([of[3].name], recorded=False, weight_error=0.08, max_over_rms=90.0)[0]
    sentences = " ".join(insights(report(tuple(of))))
    assert f"{of[3].name} has the largest weight error: 8.00 %, 8.00 times the median of 1.00 %." in sentences
    assert "The weight error of 1 of 28 layers is above 5 %." in sentences
    assert f"{of[3].name} has a weight 90.0 times the root mean square" in sentences
    assert insights(report(layers(names(2), recorded=False, weight_error=None))) == []


@pytest.mark.parametrize("of", [["lm_head"], ["model.layers.0.q_proj"], ["embed", "lm_head"]])
@pytest.mark.parametrize("changes", [{}, {"weight_error": None, "recorded": False}, {"weight_error": 0.0}])
def test_pages_of_very_little(of: list[str], changes: dict[str, Any]) -> None:
    page = Page(render(report(layers(of, **changes), record=None, file_bytes=0)))
    assert len(page.all("tr")) == 1 + len(of)


def test_what_was_measured_is_labelled(found: Report) -> None:
    text = Page(complete_page()).text
    assert "+4.44 % over 24.80" in text
    assert "text.txt, 8 windows of 1024 tokens" in text
    assert "a Llama of 29M parameters on WikiText-2, without calibration" in text
    assert "What this checkpoint costs was not measured" in Page(render(found)).text
