"""Seconds and memory that calibrated quantization takes: ``python benchmarks/calibration_speed.py --shape llama-7b``.

Checkpoints are made on the disk, with random weights: one run of normal numbers, of which every tensor is another
rotation, since the time depends on no number. Calibration tokens are random too. What is timed goes from the folder of
the checkpoint to the folder of the quantized one: reading, running, solving, writing, the job's files on the way.

``opt-175b-block`` is one block of OPT-175B; its time is also given times 96.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import itertools
import json
import math
import platform
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

import lowbit
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.statistics import Collector
from lowbit.calibration import flow, runner, work
from lowbit.calibration.data import Calibration
from lowbit.calibration.job import Job
from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun, device_name, versions
from lowbit.wire.shards import ShardWriter

GIB = 2**30
POOL = 16_777_259  # random numbers, a prime, so that no two rows of a weight are equal
STD = 0.02
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"scale_search": "minmax"},
    "fast": {"scale_search": "conditional", "sweeps": 0},
    "default": {},
}


def llama(hidden: int, inner: int, heads: int, layers: int, vocabulary: int) -> Any:
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def opt(hidden: int, inner: int, heads: int, layers: int, vocabulary: int, **others: Any) -> Any:
    return transformers.OPTConfig(
        hidden_size=hidden,
        ffn_dim=inner,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        architectures=["OPTForCausalLM"],
        dtype="bfloat16",
        **others,
    )


# By shape: its configuration, and how many blocks the real model has.
SHAPES: dict[str, tuple[Callable[[], Any], int]] = {
    "tiny": (lambda: llama(256, 512, 4, 3, 512), 3),
    "tiny-opt": (lambda: opt(256, 512, 4, 3, 512, word_embed_proj_dim=128, do_layer_norm_before=False), 3),
    "opt-350m": (lambda: opt(1024, 4096, 16, 24, 50272, word_embed_proj_dim=512, do_layer_norm_before=False), 24),
    "llama-7b": (lambda: llama(4096, 11008, 32, 32, 32000), 32),
    "opt-175b-block": (lambda: opt(12288, 49152, 96, 1, 512), 96),
}


# ---------------------------------------------------------------------------------------------------- the checkpoint


def make_checkpoint(config: Any, folder: Path) -> int:
    """Write a checkpoint of random weights; returns its bytes."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    pool = torch.empty(POOL).normal_(0, STD, generator=torch.Generator().manual_seed(0)).bfloat16()
    writer, seen, total = ShardWriter(folder, {}), set[int](), 0
    for number, (name, parameter) in enumerate(model.state_dict(keep_vars=True).items()):
        if id(parameter) in seen:  # tied to an earlier one
            continue
        seen.add(id(parameter))
        tensor = _values(name, parameter, pool, number * 7919 % POOL, config.num_hidden_layers)
        total += tensor.numel() * tensor.element_size()
        writer.add(name, tensor)
    writer.close()
    config.save_pretrained(folder)
    return total


def _values(name: str, parameter: Tensor, pool: Tensor, shift: int, layers: int) -> Tensor:
    """Norms are 1 and biases 0; what is added to the residual stream is small enough for it to stay bounded."""
    if parameter.dim() < 2:
        return (torch.zeros if name.endswith("bias") else torch.ones)(parameter.shape, dtype=pool.dtype)
    count = parameter.numel()
    rest = -(-max(0, count - len(pool) + shift) // len(pool))
    values = torch.cat([pool[shift : shift + count], *[pool] * rest])[:count].view(parameter.shape)
    adds = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight"))
    return values.mul_((2 * layers) ** -0.5) if adds else values


def random_tokens(vocabulary: int, samples: int, length: int) -> Calibration:
    ids = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(1))
    return Calibration(list(ids), f"{samples} x {length} random tokens")


# -------------------------------------------------------------------------------------------------------- measuring


class Stopwatch:
    """Adds up the time of stages, each without those within it.

    On a GPU the time is what passes between two events of the stream, so that nothing has to be waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[str] = []
        self._spans: list[tuple[str, str | None, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        parent = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._now()
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((name, parent, start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for name, parent, start, end in self._spans:
            took = start.elapsed_time(end) / 1000 if self._cuda else end - start
            totals[name] = totals.get(name, 0.0) + took
            if parent is not None:
                totals[parent] = totals.get(parent, 0.0) - took
        return totals

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time what the runner calls, by putting itself between."""
        places: list[tuple[Any, str, str]] = [
            (flow.Flow, "__init__", "embedding, first block's inputs"),
            (runner, "load_block", "loading"),
            (work.BlockWork, "_stages", "forwards for statistics"),
            (work.BlockWork, "_statistics", "forwards for statistics"),
            (Collector, "add", "Hessians"),
            (work, "solve", "solving"),
            (flow.Flow, "advance", "forwards behind quantized blocks"),
            (Job, "save", "filing finished blocks"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        try:
            for (owner, name, stage), (_, _, original) in zip(places, before, strict=True):
                setattr(owner, name, self._timed(stage, original))
            yield
        finally:
            for owner, name, original in before:
                setattr(owner, name, original)

    def _timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return work(*args, **kwargs)

        return timed


class MemoryWatch:
    """The most memory in use, sampled in a thread: of the process without mapped files, and of the whole device."""

    def __init__(self, device: torch.device, every: float = 0.02) -> None:
        self._device, self._every = device, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.host = self.host_before = self.used = self.used_before = 0

    def __enter__(self) -> MemoryWatch:
        self.host_before, self.used_before = anonymous_bytes(), self._device_bytes()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            torch.cuda.reset_peak_host_memory_stats()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            self.host = max(self.host, anonymous_bytes())
            self.used = max(self.used, self._device_bytes())

    def _device_bytes(self) -> int:
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def gib(self) -> dict[str, float]:
        found = {"host anonymous, peak": self.host, "host anonymous, before": self.host_before}
        if self._device.type == "cuda":
            found |= {
                "host pinned, peak": torch.cuda.host_memory_stats().get("allocated_bytes.peak", math.nan),
                "device tensors, peak": torch.cuda.max_memory_allocated(self._device),
                "device reserved by torch, peak": torch.cuda.max_memory_reserved(self._device),
                "device in use by all, peak": self.used,
                "device in use by all, before": self.used_before,
            }
        return {name: value / GIB for name, value in found.items()}


def anonymous_bytes() -> int:
    """Of this process: memory that no file is behind (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


# ---------------------------------------------------------------------------------------------------------- the runs


def measure(shape: str, settings: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    device = torch.device(arguments.device)
    make, blocks = SHAPES[shape]
    config = make()
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    source, result = work / "dense", work / "quantized"
    source.mkdir()
    result.mkdir()
    began = time.perf_counter()
    nbytes = make_checkpoint(config, source)
    record: dict[str, Any] = {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        "shape": shape,
        "settings": {"name": settings, "bits": 4, "group_size": 128, "symmetric": True, **SETTINGS[settings]},
        "calibration": f"{arguments.samples} x {arguments.length} random tokens",
        "layers": config.num_hidden_layers,
        "device": device_name(device),
        "versions": {**versions(), "python": platform.python_version()},
        "checkpoint_gib": nbytes / GIB,
        "seconds_to_make_the_checkpoint": time.perf_counter() - began,
    }
    calibration = random_tokens(config.vocab_size, arguments.samples, arguments.length)
    record |= quantize(source, result, work / "job", calibration, Gptq(symmetric=True, **SETTINGS[settings]), device)
    left = blocks - config.num_hidden_layers
    if left > 0:
        last = record["seconds_of_blocks"][-1]
        record["seconds_of_all_blocks"] = {"blocks": blocks, "seconds": blocks * last, "hours": blocks * last / 3600}
    if arguments.gptqmodel:
        record["gptqmodel"] = run_gptqmodel(source, work / "gptqmodel", calibration, device)
    return record


def quantize(
    source: Path, result: Path, job: Path, calibration: Calibration, algorithm: Gptq, device: torch.device
) -> dict[str, Any]:
    stopwatch = Stopwatch(device)
    method = Calibrated(lambda name: algorithm, "gptq")
    marks = [time.perf_counter()]
    with MemoryWatch(device) as memory, stopwatch.watching():
        run = CalibratedRun(
            source, lowbit.GPTQConfig(bits=4, group_size=128, sym=True), method, calibration, job, device
        )
        marks.append(time.perf_counter())
        run.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        run.write(result)
        run.close()
        marks.append(time.perf_counter())
    parts = dict(zip(("opening", "blocks", "writing the checkpoint"), _differences(marks), strict=True))
    report = json.loads((result / "quantization_report.json").read_bytes())
    return {
        "seconds": marks[-1] - marks[0],
        "seconds_of_parts": parts,
        "seconds_of_stages": {**stopwatch.seconds()},
        "seconds_of_blocks": [block["seconds"] for block in report["blocks"]],
        "gib": memory.gib(),
        "mean_output_error": sum(layer["output_error"] for layer in report["layers"]) / len(report["layers"]),
        "notes": report["notes"],
    }


def _differences(marks: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(marks)]


def run_gptqmodel(source: Path, result: Path, calibration: Calibration, device: torch.device) -> dict[str, Any]:
    """The same model, data and width with gptqmodel, from folder to folder; why not, where that can't be done.

    Its extensions are compiled before the clock starts: that takes a minute, once per machine. It wants a tokenizer.
    """
    try:
        import gptqmodel  # type: ignore[import-not-found]
    except Exception as error:  # noqa: BLE001 - its imports compile things, and raise whatever that raises
        return {"not importable": f"{type(error).__name__}: {error}"[:300]}
    record: dict[str, Any] = {"version": gptqmodel.__version__}
    began = time.perf_counter()
    try:
        write_tokenizer(source)
        record["compiled"] = compile_gptqmodel(device)
        record["seconds_to_compile"] = time.perf_counter() - began
        data = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in calibration.samples]
        marks = [time.perf_counter()]
        with MemoryWatch(device) as memory:
            config = gptqmodel.QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, device=device.type)
            model = gptqmodel.GPTQModel.load(str(source), config)
            marks.append(time.perf_counter())
            model.quantize(data, batch_size=4)
            marks.append(time.perf_counter())
            model.save(str(result))
            marks.append(time.perf_counter())
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return record | {"failed": f"{type(error).__name__}: {error}"[:300]}
    parts = dict(zip(("opening", "quantizing", "writing the checkpoint"), _differences(marks), strict=True))
    return record | {"seconds": marks[-1] - marks[0], "seconds_of_parts": parts, "gib": memory.gib()}


def compile_gptqmodel(device: torch.device) -> dict[str, bool]:
    """Which of the extensions that gptqmodel's GPTQ uses on the device there are; without one it takes a slower way."""
    if device.type == "cuda":
        from gptqmodel.quantization.gptq_cuda import block_update_available  # type: ignore[import-not-found]

        return {"gptq_block": block_update_available()}
    from gptqmodel import extension

    return {"pack_block_cpu": extension.is_available("pack_block_cpu")}


def write_tokenizer(folder: Path) -> None:
    """Put a tokenizer beside the checkpoint, with one word for each number."""
    size = transformers.AutoConfig.from_pretrained(folder).vocab_size
    words = tokenizers.models.WordLevel({f"<{number}>": number for number in range(size)}, unk_token="<0>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="<0>", bos_token="<1>", eos_token="<2>", pad_token="<2>"
    ).save_pretrained(folder)


def limit_device(gib: float, device: torch.device) -> None:
    """Let torch reserve no more than so much, as if the device had no more."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), device.index or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["opt-350m"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device-limit", type=float, help="GiB that torch may reserve on the device")
    parser.add_argument("--gptqmodel", action="store_true", help="time gptqmodel as well")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; the system's temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device_limit:
        limit_device(arguments.device_limit, torch.device(arguments.device))
    records = []
    for shape in arguments.shape:
        for settings in arguments.settings:
            work = Path(tempfile.mkdtemp(dir=arguments.folder))
            try:
                records.append(measure(shape, settings, arguments, work))
            finally:
                shutil.rmtree(work, ignore_errors=True)
            print(json.dumps(records[-1], indent=1), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
