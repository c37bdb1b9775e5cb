"""``lowbit quantize``: a dense checkpoint in, a quantized one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import calibrated, console
from lowbit.cli.loading import DType, find_folder, load_model
from lowbit.cli.replace import check_target, replaced
from lowbit.cli.request import Format, Method, Request
from lowbit.errors import PlanError

_SKIP_HELP = "Modules to keep dense: names, wildcards or regular expressions; may be repeated."


_METHOD_HELP = (
    "Of weights alone: nf4, fp4, int8, fp8, hqq, rtn (round-to-nearest). With --dataset: gptq, awq, autoround, "
    "aqlm[:2x8], gguf:TYPE (as in gguf:Q4_K_M), best."
)
_DATASET_HELP = "To calibrate on: a text or JSONL file, or wikitext2, c4, c4-new, ptb."
_CALIBRATION = "Calibration"


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a dense checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; with gguf:TYPE also a .gguf file.")],
    method: Annotated[str, typer.Option(help=_METHOD_HELP)],
    bits: Annotated[int | None, typer.Option(help="4 by default; 2 codebooks for aqlm; best needs it.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="For integers: 128 by default, for hqq 64; -1 for whole rows.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="For integers: asymmetric by default.")
    ] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4 and fp4: quantize the scales too.")] = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="By default gptq for rtn, hqq for hqq, fbgemm_fp8 for fp8, bitsandbytes for the others."
        ),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help=_SKIP_HELP)] = None,
    dtype: Annotated[DType, typer.Option(help="Of what stays dense; auto: as in SRC.")] = DType.auto,
    device: Annotated[str | None, typer.Option(help="Where to quantize: cpu, cuda:0, ..., or auto.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in DST when done.")] = False,
    dataset: Annotated[
        str | None, typer.Option(metavar="FILE", help=_DATASET_HELP, rich_help_panel=_CALIBRATION)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences of the dataset.", rich_help_panel=_CALIBRATION)] = 128,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of each; 2048 where the model takes them.", rich_help_panel=_CALIBRATION),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences.", rich_help_panel=_CALIBRATION)] = 0,
    target_bits: Annotated[
        float | None,
        typer.Option(help="best: bits per weight, all that is stored counted.", rich_help_panel=_CALIBRATION),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="best: 90s, 10m, 2h.", rich_help_panel=_CALIBRATION)
    ] = None,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="gptq: columns by falling activation.", rich_help_panel=_CALIBRATION)
    ] = False,
    static_groups: Annotated[
        bool, typer.Option("--static-groups", help="gptq: scales chosen first.", rich_help_panel=_CALIBRATION)
    ] = False,
    damp_percent: Annotated[
        float, typer.Option(min=0, max=1, help="gptq: of the Hessian's mean diagonal.", rich_help_panel=_CALIBRATION)
    ] = 0.01,
    correction: Annotated[
        bool,
        typer.Option("--correction", help="gptq: undo earlier layers' errors (GPTAQ).", rich_help_panel=_CALIBRATION),
    ] = False,
    tune: Annotated[
        int,
        typer.Option(min=0, help="gptq: steps of learning per block afterwards.", rich_help_panel=_CALIBRATION),
    ] = 0,
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Rotate the model first, merged into the weights.", rich_help_panel=_CALIBRATION),
    ] = False,
    job: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="State of the run, kept; else beside DST until done.", rich_help_panel=_CALIBRATION
        ),
    ] = None,
) -> None:
    """Quantize a model and save it, ready for Transformers and every other reader of the format.

    With a dataset the model is streamed from the disk, block by block; a run that was stopped goes on with the same
    command. `torchrun -m lowbit quantize ...` shares the work among several GPUs, with the same result.
    """
    name, variant = calibrated.parse_method(method)
    folder, skipped, kind = find_folder(source), tuple(skip or ()), _format(form)
    if name not in calibrated.NAMES:
        if dataset is not None:
            raise PlanError(f"{name} takes no calibration data; leave --dataset out, or use gptq, awq, autoround, best")
        compute = None if dtype is DType.auto else dtype.value
        plain = Request(Method(name), bits, group_size, symmetric, double_quant, kind, skipped, compute)
        _quantize_weights(plain, folder, target, dtype, device, overwrite)
        return
    if dataset is None:
        raise PlanError(f"{name} needs calibration data: --dataset FILE")
    if double_quant or dtype is not DType.auto:
        raise PlanError(f"--double-quant and --dtype are not for {name}: what stays dense is written as it is in SRC")
    settings = calibrated.settings(
        symmetric=bool(symmetric),
        damp_percent=damp_percent,
        desc_act=desc_act,
        static_groups=static_groups,
        correction=correction,
        tune=tune,
        rotate=rotate,
        seed=seed,
    )
    seconds = None if budget is None else calibrated.parse_budget(budget)
    request = calibrated.CalibratedRequest(
        name, settings, variant, bits, group_size, kind, skipped, target_bits, seconds
    )
    request.check()
    check_dense(folder)
    check_patterns(folder, list(skipped))
    work = calibrated.Work(folder, target, dataset, samples, seq_len, seed, device, job, overwrite)
    calibrated.run(request, work)


def _format(name: str | None) -> Format | None:
    if name is None:
        return None
    try:
        return Format(name)
    except ValueError as error:
        raise PlanError(f"--format is one of {', '.join(form.value for form in Format)}; found '{name}'") from error


def _quantize_weights(
    request: Request, folder: Path, target: Path, dtype: DType, device: str | None, overwrite: bool
) -> None:
    """Quantize by the weights alone: the model is loaded, and packed as it is."""
    config = request.config()
    check_target(folder, target, overwrite)
    console.silence(bars=False)
    check_dense(folder)
    check_patterns(folder, list(request.skip))
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
