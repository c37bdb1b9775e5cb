"""What a quantized checkpoint's files hold, in terms of the model that is to be loaded; from headers alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.errors import FormatError
from lowbit.integrations.transformers.experts.names import ExpertNames, StoredExperts
from lowbit.nn.activation import scale_activations
from lowbit.nn.embedding import is_embedding
from lowbit.nn.swap import is_linear, linear_shape
from lowbit.wire import Wire
from lowbit.wire.store import read_dtypes, read_header, read_shapes

_LISTED = 8
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class Inventory:
    """Maps the names in a checkpoint's files to the modules of a model on the meta device.

    Attributes:
        packed: the model's modules whose weights are stored packed.
        stored: what the files call each of them.
        metadata: what the files' headers say beside their tensors, merged.
        dense: the model's parameters that are stored as they are.
        experts: the packed matrices of fused experts.
        kept: tensors that no module has and that are saved again, by their names in the files.

    Raises:
        FormatError: pickled files, no packed weight at all, packed weights for modules that are not linear, or a layer
            of which only some experts are packed.
    """

    def __init__(self, model: Any, wire: Wire[Any], files: list[str] | None) -> None:
        self.model, self.wire = model, wire
        self.files = [Path(file) for file in files or []]
        self._expected = set(model.state_dict())
        self._modules = dict(model.named_modules())
        self._load_names()

    def shape(self, name: str) -> tuple[int, int]:
        return linear_shape(self.model.get_submodule(name))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of all packed weights, as the files call them."""
        shapes = {stored: self.shape(name) for name, stored in self.stored.items()}
        for entry in self.experts.stacks.values():
            shapes |= dict.fromkeys(entry.names.values(), entry.stack.projection.part_shape)
        return shapes

    def check_complete(self) -> None:
        """Every weight of the model has to be in the files, packed or dense; a new task's head may be missing.

        Raises:
            FormatError: names what is missing, instead of leaving it to random initialisation.
        """
        packed = {f"{name}.weight" for name in self.packed} | self.experts.parameters
        missing = self._expected - self.dense - packed - set(self._tied()) - self._ignorable()
        if lost := sorted(name for name in missing if not self._may_be_new(name)):
            raise FormatError(
                f"the checkpoint lacks {len(lost)} of the model's tensors, which would be left at random values",
                file=self._where(),
                found=f"{len(self.packed)} packed and {len(self.dense)} dense weights",
                expected=f"also {', '.join(lost[:_LISTED])}{' ...' if len(lost) > _LISTED else ''}",
            )

    def _load_names(self) -> None:
        names: list[str] = []
        self.metadata: dict[str, str] = {}
        self.kept: dict[str, Tensor] = {}
        for file in self.files:
            found, metadata = read_header(file)
            names += found
            self.metadata |= metadata
            self.kept |= _read_few(file, [name for name in found if name.endswith(self.wire.kept)])
        mapping = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._mergers = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        stored = self.wire.modules(names)
        if not stored:
            raise FormatError(
                "config.json declares a quantized checkpoint, but no tensor is",
                file=self._where(),
                found=f"{len(names)} tensors, none named *.{self.wire.marker}",
                expected=self.wire.name,
            )
        owned = {f"{module}.{suffix}" for module in stored for suffix in self.wire.suffixes}
        others = [name for name in names if name not in owned]
        self.wire.check_names(others)
        self.experts = StoredExperts(ExpertNames(self.model, mapping, fused=bool(self.wire.fused_suffixes)))
        self._present = set(names)
        fused = self._take_fused_experts(others)
        others = [name for name in others if name not in fused]
        self._scale_activations([name for name in others if name.endswith(self.wire.activation_scales)])
        try:
            self.stored = {name: module for module in stored if (name := self._module_of(module)) is not None}
            self.packed = list(self.stored)
            self.dense = {target for name in others for target in self._targets(name)}
            self.experts.check()
        except FormatError as error:
            raise error.located(file=self._where()) from error
        self._check_numbers(others)

    def _check_numbers(self, names: list[str]) -> None:
        """Refuse a weight that is stored in integers or FP8 without the scales that make numbers of them."""
        floats = {name for name, tensor in self.model.state_dict().items() if tensor.is_floating_point()}
        floats -= self.experts.parameters
        for file in self.files:
            for name, dtype in read_dtypes(file, names).items():
                if dtype not in _FLOATS and not floats.isdisjoint(self._targets(name)):
                    raise FormatError(
                        "the weight is not packed, but neither is it stored in floating point",
                        file=str(file),
                        tensor=name,
                        found=dtype,
                        expected=f"one of {sorted(_FLOATS)}, or a {self.wire.marker} beside it",
                    )

    def _scale_activations(self, names: list[str]) -> None:
        """Make room in the model for the scales of activations."""
        sizes: dict[str, int] = {}
        prefix = f"{self.model.base_model_prefix}."
        for file in self.files if names else ():
            for name, shape in read_shapes(file, names).items():
                stored = name.removesuffix(".scales")
                candidates = (stored, f"{prefix}{stored}", stored.removeprefix(prefix))
                module = next((path for path in candidates if path in self._modules), stored)
                sizes[module] = math.prod(shape)
        if sizes:
            scale_activations(self.model, sizes, next(self.model.parameters()).dtype)
            self._expected |= {f"{module}.scales" for module in sizes}
            self._modules = dict(self.model.named_modules())

    def _module_of(self, stored: str) -> str | None:
        """The module of a packed weight; None for what only the checkpoint's own class has (a pooler, a head)."""
        name = self._rename(f"{stored}.weight", []).removesuffix(".weight")
        module = self._modules.get(name)
        if module is None and self._take_expert(name, stored):
            return None
        if module is None and not self._is_own_class() and not any(part.isdigit() for part in name.split(".")):
            return None
        if module is None or not (is_linear(module) or is_embedding(module)):
            found = "no such module" if module is None else type(module).__name__
            raise FormatError(
                "the checkpoint has a packed weight for a module that lowbit can't hold packed",
                file=self._where(),
                tensor=stored,
                found=found,
                expected="a linear layer or an embedding",
            )
        if f"{name}.weight" in self._tied():
            raise FormatError(
                "the checkpoint has a packed weight for a module that the config ties to another",
                file=self._where(),
                tensor=stored,
                expected="tie_word_embeddings: false in config.json",
            )
        return name

    def _take_expert(self, name: str, stored: str) -> bool:
        suffixes = [suffix for suffix in self.wire.suffixes if f"{stored}.{suffix}" in self._present]
        return any(self.experts.take(spelled, stored, suffixes) for spelled in self._with_and_without_prefix(name))

    def _take_fused_experts(self, names: list[str]) -> set[str]:
        """The tensors of parameters that the files hold fused and packed."""
        endings, taken = self.wire.fused_suffixes, set()
        for name in names if endings else ():
            if name.endswith(endings[-1]):
                stored = name.removesuffix(endings[-1])
                suffixes = [ending for ending in endings if f"{stored}{ending}" in self._present]
                spellings = self._with_and_without_prefix(self._rename(stored, []))
                if any(self.experts.take_fused(spelled, stored, suffixes) for spelled in spellings):
                    taken |= {f"{stored}{ending}" for ending in suffixes}
        return taken

    def _with_and_without_prefix(self, name: str) -> tuple[str, ...]:
        prefix = f"{self.model.base_model_prefix}."
        return (name, name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}")

    def _rename(self, name: str, converters: list[Any]) -> str:
        prefix = self.model.base_model_prefix
        state = dict.fromkeys(self._expected, True)
        renamed: str = rename_source_key(name, self._renamings, converters, prefix, state)[0]
        if renamed not in self._expected and name in self._expected:
            return name
        return renamed

    def _targets(self, name: str) -> list[str]:
        """The parameters that a stored tensor ends up in; a split names several."""
        for spelled in self._with_and_without_prefix(self._rename(name, [])) if name.endswith(".bias") else ():
            if (parameter := self.experts.take_bias(spelled)) is not None:
                return [parameter]
        renamed = self._rename(name, self._mergers)
        for merger in self._mergers:
            first, *others = merger.target_patterns
            if others and first in renamed:
                return [renamed, *(renamed.replace(first, other) for other in others)]
        return [renamed]

    def _tied(self) -> dict[str, str]:
        return getattr(self.model, "all_tied_weights_keys", None) or {}

    def _ignorable(self) -> set[str]:
        patterns = self.model._keys_to_ignore_on_load_missing or []
        return {name for name in self._expected if any(re.search(pattern, name) for pattern in patterns)}

    def _may_be_new(self, name: str) -> bool:
        """Whether a missing tensor can belong to a head or pooler that the checkpoint's own class doesn't have.

        Never where the class is the one that was saved; else linear layers outside the repeated blocks.
        """
        if self._is_own_class():
            return False
        path = name.rpartition(".")[0]
        module = self.model.get_submodule(path)
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        return (
            isinstance(module, nn.Linear) and module is not head and not any(part.isdigit() for part in path.split("."))
        )

    def _is_own_class(self) -> bool:
        """Whether the model is of the class that was saved."""
        return type(self.model).__name__ in (self.model.config.architectures or [])

    def _where(self) -> str:
        return str(self.files[0].parent) if self.files else "state dict"


def _read_few(file: Path, names: list[str]) -> dict[str, Tensor]:
    if not names:
        return {}
    with safe_open(str(file), framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in names}
