"""``from_pretrained(folder, quantization_config=GPTQConfig(bits=4, dataset=..., tokenizer=...))``.

The checkpoint is calibrated block by block from its files before Transformers loads it; where the loader then asks for
a weight to be quantized, it is given the finished one.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lowbit.algorithms import Algorithm
from lowbit.calibration.data import DataConfig, check_ids, load_calibration, max_positions
from lowbit.calibration.units import Unit
from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import PlanError
from lowbit.integrations.transformers.assemble import Results
from lowbit.integrations.transformers.calibrate import CalibratedRun
from lowbit.integrations.transformers.calibrated_methods import Settings, calibrated_method, pick_device
from lowbit.integrations.transformers.outside import outside

LENGTH = 2048  # of calibration sequences, where the model takes so many tokens
_SAMPLES = 128


def wants_data(config: Any) -> bool:
    """Whether a quantization config brings calibration data along."""
    return getattr(config, "dataset", None) is not None


class Finished(Algorithm):
    """Gives weights that have been quantized before, one after the other."""

    name = "finished"

    def __init__(self, results: Iterator[QuantTensor]) -> None:
        self._results = results

    def supports(self, spec: QuantSpec) -> bool:
        return True

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        found = next(self._results, None)
        if found is None or found.shape != tuple(weight.shape):
            raise PlanError(f"no finished weight of shape {list(weight.shape)} is left")
        return found.to(str(weight.device))


class CalibratedOnLoad:
    """A model's weights, quantized with calibration data before it is loaded.

    Args:
        config: with `dataset`, and `tokenizer` unless the checkpoint's own will do.
        folder: of the dense checkpoint.
        device_map: where the model will be placed.

    Raises:
        PlanError: the data or the model can't be used.
    """

    def __init__(self, config: Any, folder: Path, device_map: Any) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="lowbit-"))
        # Not everything that can go wrong behind the calibration comes back here.
        self._remove = weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        try:
            self.results, self.units = outside(lambda stop: self._run(config, folder, pick_device(device_map), stop))
        except BaseException:
            self.close()
            raise

    def _run(
        self, config: Any, folder: Path, device: torch.device, stop: threading.Event
    ) -> tuple[Results, list[Unit]]:
        def tell(done: int, description: str | None = None) -> None:
            if stop.is_set():
                raise KeyboardInterrupt

        method = calibrated_method(str(getattr(config.quant_method, "value", config.quant_method)), _settings(config))
        tokenizer = _tokenizer(config, folder)
        count = len(config.dataset) if isinstance(config.dataset, list | tuple) else 0
        limit = max_positions(AutoConfig.from_pretrained(folder))
        length = getattr(config, "model_seqlen", None) or min(LENGTH, limit or LENGTH)
        data = DataConfig(samples=max(_SAMPLES, count), length=length)
        calibration = load_calibration(config.dataset, tokenizer, data)
        plain = copy.copy(config)
        plain.dataset = plain.tokenizer = None
        run = CalibratedRun(folder, plain, method, calibration, self._scratch / "job", device)
        try:
            check_ids(run.streamed.model.get_input_embeddings().weight.shape[0], calibration)
            run.run(tell)
            return run.results(), run.units
        finally:
            run.close()

    def algorithm_of(self, name: str) -> Algorithm:
        """What gives the weight of a linear layer, or the matrices in a fused parameter of experts."""
        own = [unit for unit in self.units if name == (unit.name if unit.expert is None else unit.full_parameter)]
        if not own:
            raise PlanError(f"'{name}' was not calibrated")
        return Finished(self.results.unit(unit.name) for unit in own)

    def apply_dense(self, model: Any) -> None:
        """Bring the parameters that changed beside the quantized weights (scaled norms) into a loaded model."""
        for name in self.results.dense_names:
            value = self.results.dense(name)
            if value is not None:
                parameter = model.get_parameter(name)
                parameter.data.copy_(value.to(parameter.dtype))

    def close(self) -> None:
        """Remove the files; what is mapped from them stays readable."""
        self._remove()


def _settings(config: Any) -> Settings:
    if str(getattr(config.quant_method, "value", config.quant_method)) == "awq":
        return Settings(symmetric=not config.zero_point)
    return Settings(
        symmetric=config.sym,
        damp_percent=config.damp_percent,
        desc_act=config.desc_act,
        static_groups=bool(getattr(config, "static_groups", False)),
        true_sequential=config.true_sequential,
    )


def _has_texts(dataset: Any) -> bool:
    return isinstance(dataset, str) or (
        isinstance(dataset, list | tuple) and any(isinstance(entry, str) for entry in dataset)
    )


def _tokenizer(config: Any, folder: Path) -> Any:
    """The config's, else the checkpoint's; None where there is none and ready ids may do without."""
    given = getattr(config, "tokenizer", None)
    if given is not None and not isinstance(given, str):
        return given
    try:
        return AutoTokenizer.from_pretrained(given or folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if given is None and not _has_texts(config.dataset):
            return None
        raise PlanError(
            f"no tokenizer can be loaded from '{given or folder}' ({error}); give the config one: tokenizer=..."
        ) from error
