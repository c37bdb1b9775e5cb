"""``lowbit doctor``: what is installed here, and which kernel runs what."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console

if TYPE_CHECKING:
    import torch

    from lowbit.core import QuantSpec

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton")
_SHAPE = (4096, 4096)  # of the weights that kernels are asked about, [out, in]


def command(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, formats, and the kernels for typical weights with the reasons why others don't fit."""
    console.silence(bars=as_json)
    report = examine()
    if as_json:
        console.print_json(report)
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """The report that ``--json`` prints."""
    import lowbit
    from lowbit.wire import wires

    devices = _devices()
    types = list(dict.fromkeys(device.type for device in devices))
    return {
        "lowbit": lowbit.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "transformers_range": _range(),
        "devices": [_describe(device) for device in devices],
        "wires": [wire.name for wire in wires()],
        "kernels": [_explain(title, spec, device) for device in types for title, spec in _typical().items()],
    }


def _version(package: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _range() -> dict[str, Any]:
    """The Transformers versions that lowbit is tested with, and whether the installed one is among them."""
    from packaging.version import parse

    from lowbit.integrations.transformers.quantizer import TESTED

    installed = _version("transformers")
    inside = installed is not None and parse(TESTED[0]) <= parse(installed) < parse(TESTED[1])
    return {"from": TESTED[0], "below": TESTED[1], "tested": inside}


def _devices() -> list[torch.device]:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None else 0
    return [*(torch.device(found.type, index) for index in range(count) if found is not None), torch.device("cpu")]


def _describe(device: torch.device) -> dict[str, Any]:
    import torch

    if device.type == "cpu":
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        return {"device": "cpu", "name": f"{name}, {torch.backends.cpu.get_cpu_capability()}", "memory_bytes": None}
    if device.type != "cuda":
        return {"device": str(device), "name": device.type, "memory_bytes": None}
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    return {"device": str(device), "name": name, "memory_bytes": properties.total_memory}


def _typical() -> dict[str, QuantSpec]:
    """A spec of each kind that people use."""
    from lowbit.wire import wire_named

    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "int4, groups of 128": ("gptq", {"bits": 4, "group_size": 128}),
        "nf4": ("bitsandbytes-4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        "int8": ("bitsandbytes-8bit", {"load_in_8bit": True}),
    }
    return {title: wire_named(wire).spec(wire_named(wire).parse(config)) for title, (wire, config) in configs.items()}


def _explain(title: str, spec: QuantSpec, device: str) -> dict[str, Any]:
    import torch

    from lowbit.kernels import Problem, explain

    problem = Problem(spec, _SHAPE, device, torch.bfloat16)
    kernels = [{"name": name, "refusal": refusal} for name, refusal in explain(problem)]
    return {
        "problem": title,
        "spec": str(spec),
        "shape": list(_SHAPE),
        "device": device,
        "dtype": "bfloat16",
        "kernels": kernels,
    }


def _print(report: dict[str, Any]) -> None:
    out = console.stdout()
    for name in ("lowbit", "python", *_PACKAGES):
        out.print(f"{name:<14}{report[name] or 'not installed'}")
    bounds = report["transformers_range"]
    verdict = "is" if bounds["tested"] else "is NOT"
    out.print(
        f"              this Transformers {verdict} in the tested range, {bounds['from']} to below {bounds['below']}"
    )
    for device in report["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
        out.print(f"{device['device']:<14}{device['name']}{memory}")
    out.print(f"{'formats':<14}{', '.join(report['wires'])}")
    for entry in report["kernels"]:
        shape = " x ".join(map(str, entry["shape"]))
        out.print(f"\nkernels for {entry['problem']}, {shape}, {entry['dtype']} on {entry['device']}, best first")
        for kernel in entry["kernels"]:
            out.print(f"  {kernel['name']:<16}{kernel['refusal'] or 'fits'}", markup=False)
