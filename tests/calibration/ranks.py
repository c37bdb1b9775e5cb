"""Runs calibrated jobs in several processes, which are forked and so share what was imported.

    ranks.py FOLDER PROCESSES CASE... [-- PROCESSES CASE...]

The models are in FOLDER/models; a job is FOLDER/PROCESSES/CASE/job, and what it makes goes beside it. ``CASE@N`` goes
on with what N processes did, of which the last block is taken away.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import lowbit
from lowbit.algorithms.gptq import Gptq
from lowbit.calibration.data import load_calibration
from lowbit.calibration.tune import TuneConfig
from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun
from lowbit.integrations.transformers.calibrated_methods import Settings, calibrated_method

GPTQ = Gptq(symmetric=False, sweeps=0)
CORRECTED = Gptq(symmetric=False, sweeps=0, correction=True)
LEARNING = TuneConfig(steps=2, epochs=1, batch=2)
SAMPLES = 10
TINY = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 1, "num_attention_heads": 1}


def _gptq(algorithm: Gptq = GPTQ, **options: Any) -> Callable[[], Calibrated]:
    return lambda: Calibrated(lambda name: algorithm, "gptq", batch_tokens=32, **options)


def _data(samples: int = SAMPLES, largest: int = 90) -> torch.Tensor:
    return torch.randint(3, largest, (samples, 32), generator=torch.Generator().manual_seed(1))


# Of positions behind the 20th the model that is called broken makes NaN.
LONG, SHORT = _data(1)[0].tolist(), _data(1)[0, :16].tolist()

CASES: dict[str, tuple[str, Callable[[], Calibrated], Any]] = {
    "llama": ("llama", _gptq(true_sequential=False), _data()),
    "mixtral": ("mixtral", _gptq(CORRECTED), _data(5)),
    "tuned": ("t5", _gptq(tune=LEARNING), _data(3)),
    "learned": ("llama", _gptq(distill=LEARNING), _data(4)),
    "awq": ("llama", lambda: calibrated_method("awq", Settings()), _data(2)),
    "one_batch": ("llama", _gptq(), _data(1)),
    "first_is_bad": ("broken", _gptq(), [LONG, SHORT]),
    "last_is_bad": ("broken", _gptq(), [SHORT, LONG]),
}


def run_case(folder: Path, processes: str, case: str) -> None:
    """Do the work of this process."""
    name, _, begun_by = case.partition("@")
    kind, method, ids = CASES[name]
    own = folder / processes / case
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 and begun_by:
        shutil.copytree(folder / begun_by / name / "job", own / "job")
        max((own / "job" / "blocks").glob("*.json")).unlink()
    config = lowbit.AwqConfig(group_size=32) if name == "awq" else lowbit.GPTQConfig(bits=4, group_size=32, sym=False)
    data = load_calibration(ids, None)
    run = CalibratedRun(folder / "models" / kind, config, method(), data, own / "job", torch.device("cpu"))
    run.run()
    if rank == 0:
        (own / "out").mkdir(parents=True)
        run.write(own / "out")
    run.close()


def work(folder: Path, processes: str, cases: list[str]) -> None:
    """All cases."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it: with more, sums may be made in another order
    try:
        for case in cases:
            run_case(folder, processes, case)
    finally:
        torch.set_num_threads(before)


def fork(folder: Path, processes: int, cases: list[str]) -> int:
    """Start all processes, which then share what was imported; returns how many failed."""
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            try:
                store = dist.FileStore(str(folder / f"store-{processes}"), processes)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
                work(folder, str(processes), cases)
                dist.barrier()
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def main() -> None:
    folder, given = Path(sys.argv[1]), " ".join(sys.argv[2:])
    for model in (
        transformers.LlamaForCausalLM,
        transformers.MixtralForCausalLM,
        transformers.T5ForConditionalGeneration,
    ):
        transformers.AutoModel.from_config(
            model.config_class(**TINY)
        )  # what is imported now need not be in each process
    for processes, *cases in map(str.split, given.split(" -- ")):
        if failed := fork(folder, int(processes), cases):
            sys.exit(f"{failed} of {processes} processes failed")


if __name__ == "__main__":
    main()
