"""``lowbit quantize``: a dense checkpoint in, a quantized one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.loading import DType, find_folder, load_model
from lowbit.cli.replace import check_target, replaced
from lowbit.cli.request import Format, Method, Request
from lowbit.errors import PlanError

_SKIP_HELP = "Modules to keep dense: names, wildcards or regular expressions; may be repeated."


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a dense checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    method: Annotated[Method, typer.Option(help="rtn is round-to-nearest.")],
    bits: Annotated[int | None, typer.Option(help="For rtn and hqq: 4 by default.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="For rtn: 128 by default, for hqq 64; -1 for whole rows.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="For rtn: asymmetric by default.")
    ] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4 and fp4: quantize the scales too.")] = False,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format", help="By default gptq for rtn, hqq for hqq, fbgemm_fp8 for fp8, bitsandbytes for the others."
        ),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help=_SKIP_HELP)] = None,
    dtype: Annotated[DType, typer.Option(help="Of what stays dense; auto: as in SRC.")] = DType.auto,
    device: Annotated[str | None, typer.Option(help="Where to quantize: cpu, cuda:0, ..., or auto.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in DST when done.")] = False,
) -> None:
    """Quantize a model and save it, ready for Transformers and every other reader of the format."""
    compute = None if dtype is DType.auto else dtype.value
    config = Request(method, bits, group_size, symmetric, double_quant, form, tuple(skip or ()), compute).config()
    folder = find_folder(source)
    check_target(folder, target, overwrite)
    console.silence(bars=False)
    check_dense(folder)
    check_patterns(folder, skip or [])
    model = load_model(folder, dtype=dtype, device=device, quantization_config=config)
    console.print_plan(model.hf_quantizer.plan)
    with replaced(target) as partial:
        save(model, folder, partial)
    _print_result(model, folder, target)


def check_dense(folder: Path) -> None:
    """Raise a PlanError for a checkpoint that is quantized already."""
    from lowbit.wire.store import quantization_config

    found = quantization_config(folder)
    if found is not None:
        raise PlanError(
            f"'{folder}' is quantized already ({found.get('quant_method')}); quantize the dense model instead"
        )


def check_patterns(folder: Path, patterns: list[str]) -> None:
    """Refuse patterns that no linear layer of the model matches, which are misspelled.

    Raises:
        PlanError: names the pattern, or says what is wrong with it.
    """
    if not patterns:
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowbit.nn.planning import matches
    from lowbit.nn.swap import is_linear

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, ImportError) as error:
        raise PlanError(f"Transformers can't load '{folder}': {error}") from error
    names = [name for name, module in model.named_modules() if is_linear(module)]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise PlanError(f"--skip '{pattern}' matches no linear layer; they are named like '{names[0]}'")


def save(model: Any, source: Path, folder: Path) -> None:
    """Write the model, and the files of `source` that belong to it."""
    from lowbit.integrations.convert import copy_companions

    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for the owner alone; whoever may read the config may read these
        file.chmod((folder / "config.json").stat().st_mode)
    copy_companions(source, folder)


def _print_result(model: Any, source: Path, target: Path) -> None:
    from lowbit.bench import bits_per_weight, checkpoint_bytes

    before, after = checkpoint_bytes(source), checkpoint_bytes(target)
    out = console.stdout()
    out.print(f"saved             {target}")
    ratio = f", {before / after:.2f} times smaller" if before > after > 0 else ""
    out.print(f"size              {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now{ratio}")
    out.print(f"bits per weight   {bits_per_weight(model):.3f} in the quantized layers, scales and zeros included")
