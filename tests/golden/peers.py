r"""The original GPTQ and AWQ libraries as oracles, on a CPU.

Three libraries wrote nearly all GPTQ and AWQ checkpoints. Their own packing and unpacking code runs here, so that a
test compares lowbit with them and not with a second reading of the format by the same author.

==================  =============================================  ================================================
library             install                                        how it is used here
==================  =============================================  ================================================
auto-gptq 0.7.1     ``pip install --no-deps auto-gptq==0.7.1``     two of its files, loaded by path: the package
                                                                   itself does not import under Transformers 5
autoawq 0.2.9       ``pip install --no-deps autoawq==0.2.9``       four of its files, likewise
gptqmodel 7.7.0     ``pip install --no-deps gptqmodel==7.7.0       the whole package, in a second process: importing
                    optimum==2.3.0`` and the light packages below  it patches Transformers, safetensors and Triton,
                                                                   and sets environment variables
==================  =============================================  ================================================

In one go, half a minute to a minute without a cache (the variable is for Pythons that auto-gptq has no wheel for), into
a folder apart, as ``scripts/install`` does (see :mod:`apart`)::

    BUILD_CUDA_EXT=0 pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.9 gptqmodel==7.7.0 optimum==2.3.0
    pip install defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 pillow pypcre==0.6.4 requests threadpoolctl \
        tokenicer==0.0.14

auto-gptq's wheel also puts a package called ``tests`` into site-packages: reach these files by their own names
(``import peers``), or let pytest's ``rootdir`` come first.

``--no-deps`` matters: gptqmodel asks for a newer torch than it needs, and pip would fetch gigabytes of CUDA with it
(pip then complains about torch, protobuf, pyarrow, torchao and others: none of them is needed for what is done here).
A missing library raises :class:`PeerMissing`, on which a test skips.

Throughout, ``[out, in]`` is the shape of ``nn.Linear.weight``, ``G`` the number of groups (``in / group_size``; a
group size of -1 means ``in``), and a dequantized weight is fp16, ``(q - z) * s`` rounded once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

sys.path.insert(0, str(Path(__file__).parent))

from apart import PEERS

Tensors = dict[str, torch.Tensor]


class PeerMissing(ImportError):
    """The original library that a test compares with is not installed."""


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading single files of an installed library
# ---------------------------------------------------------------------------------------------------------------------


def package_dir(package: str, distribution: str) -> Path:
    """The folder of an installed top-level package, found without running any of its code."""
    if (PEERS / package).is_dir():
        return PEERS / package
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PeerMissing(f"the original library is not installed: pip install --no-deps {distribution}")
    return Path(next(iter(spec.submodule_search_locations)))


@contextlib.contextmanager
def _modules_replaced(stubs: dict[str, types.ModuleType | None]) -> Iterator[None]:
    """``sys.modules`` with `stubs` in it (None: this import fails), as it was before on the way out."""
    before = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _load_file(path: Path, stubs: dict[str, types.ModuleType | None]) -> types.ModuleType:
    """Run one file of a library as a module of its own, with `stubs` for what it imports of its siblings."""
    spec = importlib.util.spec_from_file_location(f"_peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PeerMissing(f"the installed library has no file {path}")
    module = importlib.util.module_from_spec(spec)
    logging.getLogger(module.__name__).setLevel(logging.ERROR)  # "CUDA extension not installed."
    with _modules_replaced(stubs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def _stub(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    module.__dict__.update(attributes)
    return module


def _linear_of(weight: torch.Tensor) -> torch.nn.Linear:
    """A bias-free fp32 linear that holds a copy of `weight` [out, in]."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.detach().to("cpu", torch.float32, copy=True)
    return linear


def _stored_scales(scales: torch.Tensor) -> torch.Tensor:
    """`scales` as fp32 copies of the fp16 numbers that end up in the file, so that packing divides by those."""
    return scales.detach().cpu().half().float()


# ---------------------------------------------------------------------------------------------------------------------
# auto-gptq
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _autogptq_module(kind: str) -> types.ModuleType:
    """auto-gptq's ``qlinear_cuda_old`` or ``qlinear_cuda``, with its CUDA extensions absent (so: plain torch)."""
    folder = package_dir("auto_gptq", "auto-gptq==0.7.1") / "nn_modules" / "qlinear"
    return _load_file(folder / f"qlinear_{kind}.py", {"autogptq_cuda_64": None, "autogptq_cuda_256": None})


def _autogptq_layer(kind: str, bits: int, group_size: int, in_features: int, out_features: int) -> Any:
    layer = _autogptq_module(kind).QuantLinear(bits, group_size, in_features, out_features, bias=False)
    return layer.eval()


def autogptq_pack(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    kind: str | None = None,
) -> Tensors:
    """Pack with auto-gptq's own ``QuantLinear.pack``: what it writes to a (v1, ``"gptq"``) checkpoint.

    Args:
        weight: fp32 [out, in], both multiples of 32, already on the grid ``(q - z) * s``. auto-gptq rounds but does
            not clamp: a value outside of the grid spills over its neighbours.
        scales: [out, G], rounded to fp16 first.
        zeros: [out, G], whole numbers. **Must be at least 1.** The file holds ``zero - 1``; a zero point of 0 becomes
            -1.0, then 0xFFFFFFFF, and is OR-ed in unmasked: all bits from that field to the end of its 32-bit word
            become ones, so its later neighbours are lost, whatever the width (with 3 bits, also what the last field
            has in this word, not what it has in the next). ``cuda_old`` and ``cuda`` alike.
        g_idx: int [in], the group of each input column, or None for ``k // group_size``.
        bits: 2, 3, 4 or 8.
        group_size: -1 or a divisor of `in`.
        kind: ``"cuda_old"`` or ``"cuda"``. By default ``cuda`` where `g_idx` is given and ``cuda_old``, which has no
            act-order and ignores `g_idx`, where not. Both write the same bits.

    Returns:
        ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [G, out * bits / 32], ``scales`` fp16 [G, out],
        ``g_idx`` int32 [in].
    """
    kind = kind or ("cuda_old" if g_idx is None else "cuda")
    layer = _autogptq_layer(kind, bits, group_size, weight.shape[1], weight.shape[0])
    columns = layer.g_idx if g_idx is None else g_idx.to(torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # -1.0 as uint32, see above
        # float() copies whole numbers and clone() floats: pack() subtracts the one in place.
        layer.pack(_linear_of(weight), _stored_scales(scales), zeros.detach().cpu().float().clone(), columns)
    return {
        "qweight": layer.qweight.contiguous(),
        "qzeros": layer.qzeros.contiguous(),
        "scales": layer.scales.half().contiguous(),
        "g_idx": columns.clone(),
    }


def autogptq_dequantize(tensors: Tensors, bits: int, group_size: int, kind: str | None = None) -> torch.Tensor:
    """The weight, fp16 [out, in], that auto-gptq's own forward multiplies with.

    The forward runs on an identity matrix. Each sum then has one term that isn't zero, so the result is exact.

    Where a stored zero point has all bits set (written for a true zero point of 0):

    * ``cuda_old`` reads 0 for 2, 4 and 8 bits (it adds one and masks), but **8 for 3 bits**, where it does not mask;
    * ``cuda`` (chosen here for act-order) masks before it adds one: 4, 8, 16 and 256 for 2, 3, 4 and 8 bits. For 8
      bits its arithmetic is in int16, so 256 is kept.

    Args:
        tensors: as :func:`autogptq_pack` returns; ``g_idx`` may be missing.
        kind: ``"cuda_old"`` (ignores ``g_idx``) or ``"cuda"``; by default ``cuda`` where ``g_idx`` is not
            ``k // group_size``.
    """
    in_features, out_features = tensors["qweight"].shape[0] * 32 // bits, tensors["qweight"].shape[1]
    layer = _autogptq_layer(kind or "cuda_old", bits, group_size, in_features, out_features)
    if kind is None and "g_idx" in tensors and not torch.equal(tensors["g_idx"].int(), layer.g_idx):
        layer = _autogptq_layer("cuda", bits, group_size, in_features, out_features)
    layer.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        return layer(torch.eye(in_features, dtype=torch.float16)).T.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# autoawq
# ---------------------------------------------------------------------------------------------------------------------

_AWQ_LAYERS = {
    "gemm": ("gemm", "WQLinear_GEMM"),
    "gemv": ("gemv", "WQLinear_GEMV"),
    "gemv_fast": ("gemv_fast", "WQLinear_GEMVFast"),
}


@functools.cache
def _autoawq_module(relative: str) -> types.ModuleType:
    """One file of autoawq, with its CUDA and Triton kernels absent (so: plain torch and numpy)."""
    root = package_dir("awq", "autoawq==0.2.9")
    if relative == "utils/packing_utils.py":
        return _load_file(root / relative, {})
    packing = _autoawq_module("utils/packing_utils.py")
    stubs: dict[str, types.ModuleType | None] = {
        "awq": _stub("awq"),
        "awq.utils": _stub("awq.utils"),
        "awq.utils.module": _stub("awq.utils.module", try_import=lambda name: (None, f"{name} is left out")),
        "awq.utils.utils": _stub("awq.utils.utils", get_best_device=lambda: "cpu"),
        "awq.utils.packing_utils": packing,
        "awq.modules": None,
    }
    return _load_file(root / relative, stubs)


def _autoawq_class(version: str) -> Any:
    if version not in _AWQ_LAYERS:
        raise ValueError(f"autoawq has no version {version!r}, only {sorted(_AWQ_LAYERS)}")
    stem, name = _AWQ_LAYERS[version]
    return getattr(_autoawq_module(f"modules/linear/{stem}.py"), name)


def autoawq_pack(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int, version: str = "gemm"
) -> Tensors:
    """Pack 4-bit codes with autoawq's own ``WQLinear_*.from_linear``: what it writes to a checkpoint.

    Args:
        weight: fp32 [out, in], already on the grid ``(q - z) * s``: codes are rounded, not clamped.
        scales: [out, G], rounded to fp16 first.
        zeros: [out, G], whole numbers, 0 to 15. Stored as they are: AWQ has no "minus one".
        group_size: -1 or a divisor of `in`. gemv and gemv_fast know 32, 64, 128 and larger ones.
        version: ``"gemm"``, ``"gemv"`` or ``"gemv_fast"``.

    Returns, with ``W = ceil(ceil(G / 8) / m) * m`` and m = 1, 2, 4 for groups of 128 or more, 64, 32:
        gemm: ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [G, out / 8], ``scales`` fp16 [G, out];
        gemv: ``qweight`` int32 [out, in / 8], ``qzeros`` int32 [out, W], ``scales`` fp16 [out, 8 W];
        gemv_fast: ``qweight`` int16 [out / 4, in], ``qzeros`` fp16 [8 W, out] (``-z * s``), ``scales`` fp16 [8 W, out].
    """
    group_size = weight.shape[1] if group_size == -1 else group_size  # from_linear divides by it as it is
    scales, zeros = _stored_scales(scales), zeros.detach().cpu().float()
    if version == "gemm":
        scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    layer = _autoawq_class(version).from_linear(_linear_of(weight), 4, group_size, scales=scales, zeros=zeros)
    return {name: getattr(layer, name).detach().contiguous() for name in ("qweight", "qzeros", "scales")}


def autoawq_dequantize(tensors: Tensors, version: str = "gemm", group_size: int = 128) -> torch.Tensor:
    """The weight, fp16 [out, in], that autoawq multiplies with.

    gemm goes through autoawq's own ``dequantize_gemm``. For gemv and gemv_fast autoawq has CUDA kernels only, **no
    reader for a CPU**; here the codes are found by inverting its own packer (:func:`_awq_sources`), and the
    kernels' formula is applied to them:

    * gemv: ``(q - z) * s``;
    * gemv_fast: ``q * s + qzeros`` with ``qzeros = -(z * s)`` already rounded to fp16, rounded once more (the
      kernels use a fused multiply-add), so a value can differ from gemm's in the last bit.
    """
    if version == "gemm":
        in_features = tensors["qweight"].shape[0]
        dequantize = _autoawq_module("utils/packing_utils.py").dequantize_gemm
        group_size = in_features if group_size == -1 else group_size
        return dequantize(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, group_size).T.contiguous()
    codes = _awq_codes(tensors["qweight"], version).float()
    group_size = codes.shape[1] if group_size == -1 else group_size
    groups = torch.arange(codes.shape[1]) // group_size
    if version == "gemv":
        zeros = _nibbles(tensors["qzeros"])[:, groups].float()
        return ((codes - zeros) * tensors["scales"][:, groups].float()).half()
    scales, offsets = tensors["scales"].T[:, groups].float(), tensors["qzeros"].T[:, groups].float()
    return (codes * scales + offsets).half()


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """The 4-bit fields of int16 or int32 words [rows, n], lowest first: int64 [rows, n * fields per word]."""
    shifts = torch.arange(0, words.element_size() * 8, 4)
    return ((words.long()[:, :, None] >> shifts) & 15).flatten(1)


def _awq_codes(qweight: torch.Tensor, version: str) -> torch.Tensor:
    """The codes, int64 [out, in], behind a gemv or gemv_fast ``qweight``."""
    rows, words = qweight.shape
    out, width = (4 * rows, words) if version == "gemv_fast" else (rows, 8 * words)
    codes = torch.empty(out * width, dtype=torch.int64)
    codes[_awq_sources(out, width, version)] = _nibbles(qweight).flatten()
    return codes.reshape(out, width)


@functools.cache
def _awq_sources(out: int, width: int, version: str) -> torch.Tensor:
    """For each 4-bit field of a ``qweight``, in file order, the index of its code in [out, in]: int64 [out * in].

    Packing only moves fields about. So autoawq packs the digits (base 16) of each code's own index; what then stands
    in a field says where the field comes from.
    """
    index = torch.arange(out * width).reshape(out, width)
    sources = torch.zeros(out * width, dtype=torch.int64)
    for shift in range(0, (out * width - 1).bit_length(), 4):
        digits = ((index >> shift) & 15).float()
        packed = autoawq_pack(digits, torch.ones(out, 1), torch.zeros(out, 1), -1, version)["qweight"]
        sources |= _nibbles(packed).flatten() << shift
    return sources


# ---------------------------------------------------------------------------------------------------------------------
# A second process, for gptqmodel and for stock Transformers, where nothing of lowbit is ever imported
# ---------------------------------------------------------------------------------------------------------------------

_WORKER_ENVIRONMENT = {
    "GPTQMODEL_DISABLE_PACK_EXT": "1",  # else it compiles a C++ extension first
    "GPTQMODEL_CPU_WORKERS": "2",  # its own choice is 1 on two cores, which its thread pool then refuses
    "TORCHDYNAMO_DISABLE": "1",  # its layers compile their dequantization: the same numbers, much later
    "CUDA_VISIBLE_DEVICES": "",  # an oracle computes the same everywhere
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@functools.cache
def _worker() -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """The process, started on first use (it ends with this one), and the file that has what it says on stderr."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
    environment = {**os.environ, "PYTHONPATH": str(PEERS), **_WORKER_ENVIRONMENT}
    command = [sys.executable, str(Path(__file__).resolve())]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment)
    return worker, log


def _in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call one of this file's functions in the worker. The two processes trust each other: they pickle.

    The first call that imports gptqmodel takes five to ten seconds.
    """
    worker, log = _worker()
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the worker has no pipes")
    try:
        pickle.dump((function.__name__, arguments), worker.stdin)
        worker.stdin.flush()
        result = pickle.load(worker.stdout)
    except (EOFError, BrokenPipeError):
        _worker.cache_clear()
        log.seek(0)
        said = log.read()[-2000:].decode(errors="replace")
        raise RuntimeError(f"the peers' process died in {function.__name__}; its last words:\n{said}") from None
    if isinstance(result, Exception):
        raise result
    return result


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The worker's loop: read a call, make it, write the result or the exception."""
    while True:
        try:
            name, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            result = globals()[name](*arguments)
        except ImportError as error:
            result = PeerMissing(f"in the peers' process: {error}")
        except Exception:  # noqa: BLE001 whatever it is, it belongs to the caller
            result = RuntimeError(f"in the peers' process:\n{traceback.format_exc()}")
        pickle.dump(result, answers)
        answers.flush()


def _in_gptqmodel(function: Callable[..., Any], *arguments: Any) -> Any:
    package_dir("gptqmodel", "gptqmodel==7.7.0 (and what peers.py lists)")
    return _in_worker(function, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# gptqmodel
# ---------------------------------------------------------------------------------------------------------------------


def gptqmodel_pack(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    checkpoint_format: str = "gptq",
) -> Tensors:
    """Pack with gptqmodel's own ``TorchLinear.pack``: what it writes to a ``"gptq"`` (v1) or ``"gptq_v2"`` checkpoint.

    Arguments and result are those of :func:`autogptq_pack`, and so are the bits, except that codes are clamped and
    that zero points may be 0. v2 stores them as they are. For v1 gptqmodel subtracts 0x11111111 (4 bits; likewise
    0x55555555 and 0x01010101) **from the whole word**: a 0 becomes all ones and borrows one from the next field up,
    which is then one too small. With 3 bits it works field by field: 0 becomes 7 and no other field changes.
    """
    if g_idx is None:
        size = weight.shape[1] if group_size == -1 else group_size
        g_idx = torch.arange(weight.shape[1]) // size
    arguments = (weight.detach().cpu().float(), _stored_scales(scales), zeros.detach().cpu().int(), g_idx.cpu().int())
    return _in_gptqmodel(_gptqmodel_pack, *arguments, bits, group_size, checkpoint_format)


def gptqmodel_dequantize(tensors: Tensors, bits: int, group_size: int, checkpoint_format: str = "gptq") -> torch.Tensor:
    """The weight, fp16 [out, in], by gptqmodel's own ``TorchLinear.dequantize_weight``.

    v1 zero points are first converted as gptqmodel does on loading. With 2, 4 and 8 bits it adds 0x55555555,
    0x11111111 or 0x01010101 **to the whole word**: all ones become 0 and carry into the next field up, which undoes
    exactly what :func:`gptqmodel_pack` did, and misreads a file that some other writer left without the borrow. With
    3 bits it works field by field: 7 becomes 0, nothing is carried.
    """
    return _in_gptqmodel(_gptqmodel_dequantize, tensors, bits, group_size, checkpoint_format)


def gptqmodel_awq_pack(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int) -> Tensors:
    """Pack 4-bit codes with gptqmodel's own ``AwqTorchLinear.pack``; as :func:`autoawq_pack` for ``"gemm"``."""
    arguments = (weight.detach().cpu().float(), _stored_scales(scales), zeros.detach().cpu().float())
    return _in_gptqmodel(_gptqmodel_awq_pack, *arguments, group_size)


def gptqmodel_awq_dequantize(tensors: Tensors, group_size: int) -> torch.Tensor:
    """The weight, fp16 [out, in], of a gemm layer as gptqmodel's ``AwqTorchLinear`` multiplies with it."""
    return _in_gptqmodel(_gptqmodel_awq_dequantize, tensors, group_size)


def gptqmodel_config(bits: int, group_size: int, sym: bool, desc_act: bool, checkpoint_format: str) -> dict[str, Any]:
    """The ``quantization_config`` that gptqmodel writes beside a GPTQ checkpoint of these parameters."""
    return _in_gptqmodel(_gptqmodel_config, bits, group_size, sym, desc_act, checkpoint_format)


def gptqmodel_quantize(src_dir: str | Path, dst_dir: str | Path, texts: list[str], **settings: Any) -> None:
    """Quantize and save a model with gptqmodel itself, calibrated on `texts`: its own algorithm, its own files.

    `settings` are those of its ``QuantizeConfig``: ``bits``, ``group_size``, ``sym``, ``desc_act``, ``quant_method``
    (``"gptq"``, ``"awq"``), ``format`` (``"gptq"``, ``"gptq_v2"``; ``"gemm"``, as its other AWQ formats need a GPU).
    The little model of the testbed takes five seconds with GPTQ and forty with AWQ, on two cores. The weights that it
    leaves alone stay in the source's dtype, bf16.
    """
    _in_gptqmodel(_gptqmodel_quantize, str(src_dir), str(dst_dir), texts, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Stock Transformers
# ---------------------------------------------------------------------------------------------------------------------


def transformers_logits_with_peers(path: str | Path, input_ids: torch.Tensor, dtype: str = "float16") -> torch.Tensor:
    """The logits, fp32 [batch, length, vocabulary], of the stock model at `path`, loaded and run in the worker."""
    return _in_worker(_transformers_logits, str(path), input_ids, dtype)


def transformers_weights_with_peers(path: str | Path) -> Tensors:
    """The dequantized weight, fp16 [out, in], of each quantized layer of the stock model at `path`, by module name."""
    return _in_gptqmodel(_transformers_weights, str(path))


def transformers_load_with_peers(path: str | Path, dtype: str = "float16") -> torch.nn.Module:
    """The GPTQ or AWQ checkpoint at `path` as stock Transformers loads it, with gptqmodel (and optimum for GPTQ).

    It cannot load a GPTQ checkpoint without ``g_idx``: Transformers fills the buffer with whatever memory holds. The
    layers are gptqmodel's plain torch ones, which dequantize and multiply; left to itself it would choose
    ``TorchAtenLinear`` here, which repacks the weights. AWQ checkpoints must be of version gemm: gptqmodel has CUDA
    kernels only for the others.

    **This imports gptqmodel into the calling process**, with all that it patches, and what lowbit has registered with
    Transformers stays registered. In a test, the two functions above are the better choice.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig

    if AutoConfig.from_pretrained(path).quantization_config["quant_method"] == "bitsandbytes":
        import bitsandbytes.nn.modules

        # On CPUs with AVX512-BF16 it has a kernel of its own, which rounds in another order than its plain path.
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map="cpu").eval()
    package_dir("gptqmodel", "gptqmodel==7.7.0 (and what peers.py lists)")
    awq = AutoConfig.from_pretrained(path).quantization_config["quant_method"] == "awq"
    plain = AwqConfig(backend="torch_awq") if awq else GPTQConfig(bits=4, backend="gptq_torch")  # only backend counts
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), device_map="cpu", quantization_config=plain
    )
    for module in model.modules():
        vars(module).pop("dequantize_weight", None)  # a torch.compile of the method of this name
    return model.eval()


def bitsandbytes_save(src_dir: str | Path, dst_dir: str | Path, settings: dict[str, Any]) -> Tensors:
    """Quantize with stock Transformers and bitsandbytes, save, and return the weights by bitsandbytes' own reader.

    Args:
        settings: keyword arguments of ``BitsAndBytesConfig``; dtypes by name.

    Returns:
        ``{module name: weight [out, in]}``, dequantized **before any forward**, since the first one on a CPU repacks
        4-bit weights in place: for 4 bits in the quant state's dtype (bf16, as the source's), for 8 bits in fp32.
    """
    package_dir("bitsandbytes", "bitsandbytes")
    return _in_worker(_bitsandbytes_save, str(src_dir), str(dst_dir), settings)


def bitsandbytes_weights(path: str | Path) -> Tensors:
    """The weights [out, in] of a bitsandbytes checkpoint that stock Transformers loads, by bitsandbytes' own reader."""
    package_dir("bitsandbytes", "bitsandbytes")
    return _in_worker(_bitsandbytes_weights, str(path))


# ---------------------------------------------------------------------------------------------------------------------
# What follows runs in the worker
# ---------------------------------------------------------------------------------------------------------------------


def _gptqmodel_layer(bits: int, group_size: int, in_features: int, out_features: int) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(bits, group_size, False, False, in_features, out_features).eval()


def _gptqmodel_pack(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    group_size: int,
    checkpoint_format: str,
) -> Tensors:
    from gptqmodel import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = _gptqmodel_layer(bits, group_size, weight.shape[1], weight.shape[0])
    layer.pack(_linear_of(weight), scales, zeros, g_idx)
    layer.qzero_format(format=2)
    if checkpoint_format == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group_size))
    return {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}


def _gptqmodel_dequantize(tensors: Tensors, bits: int, group_size: int, checkpoint_format: str) -> torch.Tensor:
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    layer = _gptqmodel_layer(bits, group_size, tensors["qweight"].shape[0] * 32 // bits, tensors["qweight"].shape[1])
    layer.load_state_dict(tensors, strict="g_idx" in tensors)
    if checkpoint_format == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits, layer.pack_dtype)
    layer._init_wf_unsqueeze_buffers()
    return layer.dequantize_weight().T.half().contiguous()


def _awq_layer(group_size: int, in_features: int, out_features: int) -> Any:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return AwqTorchLinear(4, group_size, False, False, in_features, out_features, register_buffers=True).eval()


def _gptqmodel_awq_pack(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int) -> Tensors:
    layer = _awq_layer(group_size, weight.shape[1], weight.shape[0])
    layer.pack(_linear_of(weight), scales.half().float(), zeros)
    return {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales")}


def _gptqmodel_awq_dequantize(tensors: Tensors, group_size: int) -> torch.Tensor:
    layer = _awq_layer(group_size, tensors["qweight"].shape[0], tensors["scales"].shape[1])
    layer.load_state_dict(tensors)
    return _awq_weight(layer)


def _awq_weight(layer: Any) -> torch.Tensor:
    nowhere = torch.empty(0, dtype=torch.float16)
    return layer._dequantize_weight_for_inference(nowhere, dtype=torch.float16).T.contiguous()


def _gptqmodel_config(bits: int, group_size: int, sym: bool, desc_act: bool, checkpoint_format: str) -> dict[str, Any]:
    from gptqmodel import QuantizeConfig

    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, format=checkpoint_format, offload_to_disk=False
    )
    return json.loads(json.dumps(config.to_dict(), default=str))


def _gptqmodel_quantize(src_dir: str, dst_dir: str, texts: list[str], settings: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(src_dir, QuantizeConfig(**settings, offload_to_disk=False), device="cpu")
    model.quantize(texts, batch_size=1)
    model.save(dst_dir)


def _transformers_logits(path: str, input_ids: torch.Tensor, dtype: str) -> torch.Tensor:
    with torch.no_grad():
        return transformers_load_with_peers(path, dtype)(input_ids).logits.float()


def _transformers_weights(path: str) -> Tensors:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    weights = {}
    for name, module in transformers_load_with_peers(path).named_modules():
        if isinstance(module, AwqTorchLinear):
            weights[name] = _awq_weight(module)
        elif isinstance(module, TorchLinear):
            weights[name] = module.dequantize_weight().T.half().contiguous()
    return weights


def _bitsandbytes_save(src_dir: str, dst_dir: str, settings: dict[str, Any]) -> Tensors:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        src_dir, dtype="auto", device_map="cpu", quantization_config=config
    ).eval()
    weights = _weights_of(model)
    model.save_pretrained(dst_dir)
    return weights


def _bitsandbytes_weights(path: str) -> Tensors:
    return _weights_of(transformers_load_with_peers(path))


def _weights_of(model: torch.nn.Module) -> Tensors:
    found = {name: _bitsandbytes_weight(module) for name, module in model.named_modules()}
    return {name: weight for name, weight in found.items() if weight is not None}


def _bitsandbytes_weight(module: torch.nn.Module) -> torch.Tensor | None:
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).clone()
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what gptqmodel prints must not reach the pipe
    _serve(sys.stdin.buffer, answers)
