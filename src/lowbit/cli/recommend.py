"""``lowbit recommend``: a method and a bit width that fit a memory, and why."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.loading import find_folder
from lowbit.errors import PlanError

if TYPE_CHECKING:
    from lowbit.integrations.recommend import Option, Recommendation

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_CONFIG_FILES = ("*.json",)  # what is fetched of a model on the hub


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a dense checkpoint.")],
    device: Annotated[str, typer.Option(help="Where it shall run: cpu, cuda, mps, ...; it need not be here.")] = "cpu",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What may be used, like 8GiB; by default all that is here.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Pick the quantization with the best quality that fits; reads the configuration only, no weights."""
    console.silence(bars=True)
    kind = device.partition(":")[0]
    size = parse_size(memory) if memory is not None else _memory_here(device)
    found = _recommend(model, kind, size, context)
    choice = found.choice
    if as_json:
        console.print_json(_report(found, model, kind, context))
    else:
        _print(found, choice, model)


def parse_size(text: str) -> int:
    """Bytes from ``8GiB``, ``8 GB``, ``512M``, ``1073741824``; ``GiB`` and ``G`` are 2**30, ``GB`` is 10**9.

    Raises:
        PlanError: not a size, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise PlanError(f"'{text}' is not a size; write 8GiB, 8GB or 512MiB")
    number, unit, binary = match.groups()
    decimal = text.strip().lower().endswith("b") and unit and not binary
    size = int(float(number) * (1000 if decimal else 1024) ** _POWERS[unit.upper()])
    if size == 0:
        raise PlanError("nothing fits into no memory")
    return size


def _memory_here(device: str) -> int:
    """All memory of a device of this machine.

    Raises:
        PlanError: it isn't here.
    """
    import torch

    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    raise PlanError(f"there is no device '{device}' here whose memory could be asked for; give --memory")


def _recommend(model: str, device: str, memory: int, context: int) -> Recommendation:
    from transformers import AutoConfig

    from lowbit.integrations.recommend import recommend
    from lowbit.wire.store import quantization_config

    folder = find_folder(model, _CONFIG_FILES)
    stored = quantization_config(folder)
    if stored is not None:
        raise PlanError(f"'{model}' is quantized already ({stored.get('quant_method')}); give the dense model")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PlanError(f"Transformers can't read the configuration of '{model}': {error}") from error
    return recommend(config, device=device, memory=memory, context=context)


def _report(found: Recommendation, model: str, device: str, context: int) -> dict[str, Any]:
    from lowbit.integrations.recommend import describe

    return {
        "model": model,
        "device": device,
        "memory_bytes": found.memory,
        "context": context,
        "choice": describe(found.choice, model),
        "reasons": found.reasons(),
        "alternatives": [describe(option, model) for option in found.fitting[1:]],
        "too_large": [describe(option, model) for option in found.too_large],
    }


def _print(found: Recommendation, choice: Option, model: str) -> None:
    from lowbit.integrations.recommend import describe

    out = console.stdout()
    out.print(f"recommended       {choice.candidate.title}, {choice.bits_per_weight:.3f} bits per weight", markup=False)
    for label, reason in zip(["why", *[""] * 9], found.reasons(), strict=False):
        out.print(f"{label:<18}{reason}", markup=False)
    shown = describe(choice, model)
    for label, name in (("command", "command"), ("config", "config")):
        if shown[name]:
            out.print(f"{label:<18}{shown[name]}", markup=False, soft_wrap=True)
    _print_others("also fit", found.fitting[1:])
    _print_others("too large", found.too_large)


def _print_others(label: str, options: tuple[Option, ...]) -> None:
    from lowbit.integrations.recommend import gib

    out = console.stdout()
    for title, option in zip([label, *[""] * len(options)], options, strict=False):
        cost = f"+{option.candidate.perplexity:g} % perplexity" if option.candidate.perplexity else "no loss"
        size = f"{gib(option.need.total):>10}  {option.bits_per_weight:6.3f} bits"
        out.print(f"{title:<18}{size}  {option.candidate.title} ({cost})", markup=False)
