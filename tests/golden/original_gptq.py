"""auto-gptq's GPTQ and Quantizer at work on single layers: ``original_gptq.py FOLDER``.

Reads ``inputs.safetensors`` (``<layer>/weight [out, in]``, ``<layer>/hessian [in, in]``, the mean of x xᵀ) and
``cases.json``: by case its ``layer``, ``bits``, ``group_size``, ``symmetric``, ``desc_act``, ``static_groups``,
``block_size``, ``mse`` and ``damp``. Writes ``outputs.safetensors`` with ``<case>/weight``, ``<case>/scales``,
``<case>/zeros`` (both ``[out, groups]``) and ``<case>/group_index [in]``.

The two files are loaded by path: the package doesn't import under Transformers 5.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def load() -> tuple[Any, Any]:
    found = importlib.util.find_spec("auto_gptq")  # finding a package runs none of its code
    if found is None or not found.submodule_search_locations:
        raise ImportError("auto-gptq is not installed")
    folder = Path(next(iter(found.submodule_search_locations))) / "quantization"
    for name in ("auto_gptq", "auto_gptq.quantization"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    modules = []
    for stem in ("quantizer", "gptq"):
        spec = importlib.util.spec_from_file_location(f"auto_gptq.quantization.{stem}", folder / f"{stem}.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"auto-gptq has no {stem}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        modules.append(module)
    return modules[1].GPTQ, modules[0].Quantizer


def quantize(case: dict[str, Any], weight: torch.Tensor, hessian: torch.Tensor, gptq: Any, quantizer: Any) -> Tensors:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    job = gptq(layer)
    job.quantizer = quantizer()
    job.quantizer.configure(case["bits"], perchannel=True, sym=case["symmetric"], mse=case["mse"])
    job.H, job.nsamples = 2 * hessian, 1  # what add_batch sums up is the mean of 2 x xᵀ
    scales, zeros, group_index = job.fasterquant(
        blocksize=case["block_size"],
        percdamp=case["damp"],
        group_size=case["group_size"],
        actorder=case["desc_act"],
        static_groups=case["static_groups"],
    )
    return {"weight": layer.weight.data, "scales": scales, "zeros": zeros, "group_index": group_index}


def main(folder: Path) -> None:
    gptq, quantizer = load()
    torch.cuda.synchronize = lambda *_: None  # it is called on a CPU, too
    inputs, outputs = load_file(folder / "inputs.safetensors"), {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        weight, hessian = inputs[f"{case['layer']}/weight"], inputs[f"{case['layer']}/hessian"]
        made = quantize(case, weight, hessian, gptq, quantizer)
        outputs |= {f"{name}/{key}": tensor.contiguous() for key, tensor in made.items()}
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
