"""Mixtures: which type each tensor of a model gets under a name such as ``Q4_K_M``, as llama.cpp chooses it.

A mixture has one type for most weights and spends more bits where errors hurt: on the values' projection, the way down
of the MLP, the embedding and the head, mostly in the first and last layers. What it chooses depends on the tensor's
role, layer and width, on a few facts of the model, and on whether there is an importance matrix, without which the
smallest mixtures are refused. ``MXFP4`` is lowbit's own: llama.cpp has ``MXFP4_MOE`` only, which gives experts MXFP4
and everything else Q8_0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lowbit.errors import FormatError, PlanError
from lowbit.wire.gguf.types import GgmlType

_T = GgmlType


@dataclass(frozen=True)
class ModelFacts:
    """What a mixture has to know of the model.

    Attributes:
        architecture: as ``general.architecture`` calls it.
        layers: how many blocks.
        heads: of attention.
        kv_heads: as many as `heads`, or fewer that several heads share.
        experts: of a mixture of experts, 0 for none.
        tied: whether the head is the embedding: there is no ``output.weight``.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False

    @property
    def shared(self) -> bool:
        """Whether at least four heads share keys and values, so that these are small and worth more bits."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4

    @property
    def downs(self) -> int:
        """How many tensors of a layer are ways down of the MLP: shared experts have one of their own."""
        return 2 if self.architecture == "qwen2moe" else 1

    @property
    def is_70b(self) -> bool:
        return self.architecture in ("llama", "qwen2") and self.layers == 80 and self.heads != self.kv_heads


# Name: the type of most weights, and llama.cpp's number for ``general.file_type``.
_NAMES: Final[Mapping[str, tuple[GgmlType, int]]] = {
    "F32": (_T.F32, 0),
    "F16": (_T.F16, 1),
    "BF16": (_T.BF16, 32),
    "Q4_0": (_T.Q4_0, 2),
    "Q4_1": (_T.Q4_1, 3),
    "Q5_0": (_T.Q5_0, 8),
    "Q5_1": (_T.Q5_1, 9),
    "Q8_0": (_T.Q8_0, 7),
    "Q2_K": (_T.Q2_K, 10),
    "Q2_K_S": (_T.Q2_K, 21),
    "Q3_K_S": (_T.Q3_K, 11),
    "Q3_K_M": (_T.Q3_K, 12),
    "Q3_K_L": (_T.Q3_K, 13),
    "Q4_K_S": (_T.Q4_K, 14),
    "Q4_K_M": (_T.Q4_K, 15),
    "Q5_K_S": (_T.Q5_K, 16),
    "Q5_K_M": (_T.Q5_K, 17),
    "Q6_K": (_T.Q6_K, 18),
    "IQ1_S": (_T.IQ1_S, 24),
    "IQ1_M": (_T.IQ1_M, 31),
    "IQ2_XXS": (_T.IQ2_XXS, 19),
    "IQ2_XS": (_T.IQ2_XS, 20),
    "IQ2_S": (_T.IQ2_XS, 28),
    "IQ2_M": (_T.IQ2_S, 29),
    "IQ3_XXS": (_T.IQ3_XXS, 23),
    "IQ3_XS": (_T.IQ3_S, 22),
    "IQ3_S": (_T.IQ3_S, 26),
    "IQ3_M": (_T.IQ3_S, 27),
    "IQ4_NL": (_T.IQ4_NL, 25),
    "IQ4_XS": (_T.IQ4_XS, 30),
    "TQ1_0": (_T.TQ1_0, 36),
    "TQ2_0": (_T.TQ2_0, 37),
    "MXFP4_MOE": (_T.MXFP4, 38),
    "MXFP4": (_T.MXFP4, 38),
    "NVFP4": (_T.NVFP4, 39),
    "Q1_0": (_T.Q1_0, 40),
}
_ALIASES: Final = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
MIXTURES: Final = (*_NAMES, *_ALIASES)

# Rules of their own: those in which IQ3_S is spent where errors hurt, and all of them.
_WITH_IQ3_S: Final = ("IQ2_S", "IQ2_M")
_LOW: Final = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", *_WITH_IQ3_S)
# llama.cpp refuses IQ1, IQ2 and IQ3_XXS without importance, and Q2_K where a whole file is made of it.
NEED_IMPORTANCE: Final = (*_LOW, "IQ3_XXS", "IQ3_XS", "Q2_K_S")

# What a type becomes in rows that aren't whole blocks of 256: one with blocks of 32.
_NARROW: Final = {
    **dict.fromkeys((_T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S), _T.IQ4_NL),
    _T.IQ4_XS: _T.IQ4_NL,
    _T.Q2_K: _T.Q4_0,
    _T.Q3_K: _T.Q4_0,
    _T.TQ1_0: _T.Q4_0,
    _T.TQ2_0: _T.Q4_0,
    _T.Q4_K: _T.Q5_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q6_K: _T.Q8_0,
    _T.NVFP4: _T.Q4_0,
    _T.Q1_0: _T.Q4_0,
}

_EMBEDDING: Final = {
    **dict.fromkeys(("TQ1_0", "TQ2_0"), _T.Q4_K),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), _T.Q2_K),
    **dict.fromkeys((*_WITH_IQ3_S, "IQ3_XXS"), _T.IQ3_S),
}
# The attention's output projection; of eight experts, where it is small beside them, Q5_K in all these.
_OUTPUT: Final = {
    "Q2_K": _T.Q3_K,
    "Q3_K_M": _T.Q4_K,
    "Q3_K_L": _T.Q5_K,
    "IQ3_XXS": _T.IQ3_S,
    "IQ3_M": _T.Q4_K,
    **dict.fromkeys(("IQ1_S", "IQ1_M"), _T.IQ2_XXS),
    **dict.fromkeys(_WITH_IQ3_S, _T.IQ3_S),
}
_OUTPUT_OF_EIGHT: Final = (
    *_LOW, "Q2_K", "Q3_K_S", "Q3_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip

_LAYER: Final = re.compile(r"blk\.(\d{1,6})\.")
# Parts of names of matrices that stay as they are: routers, norms, positions, convolutions, and other small ones.
_KEPT: Final = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "time_mix_", "attn_rel_b.weight", ".position_embd", ".rel_pos", ".patch_embd",
    ".patch_merger",
)  # fmt: skip
_KEPT_NAMES: Final = ("position_embd.weight", "token_types.weight")
# The large ones among RWKV's; the others of ``time_mix_`` are small.
_RWKV_LARGE: Final = ("receptance", "key", "value", "gate", "output")

_ROLES: Final = (
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "v"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "o"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)


@dataclass(frozen=True)
class Mixture:
    """A mixture's name, understood; call it to get a tensor's type.

    Attributes:
        name: without aliases.
        base: the type of most weights.
        file_type: the number for ``general.file_type``.
        importance: whether weights are made with an importance matrix, or with what takes its place.
    """

    name: str
    base: GgmlType
    file_type: int
    importance: bool = False

    def __call__(self, tensor: str, shape: tuple[int, ...], model: ModelFacts, stored: GgmlType = _T.F32) -> GgmlType:
        """The type of one tensor.

        Args:
            tensor: its name in the GGUF file.
            shape: in torch's order.
            stored: what tensors that aren't quantized are stored as.
        """
        if not is_quantized(tensor, shape):
            return stored
        if self.base.dense:
            return self.base
        return fitting(self._chosen(tensor, shape, model), shape[-1])

    def _chosen(self, tensor: str, shape: tuple[int, ...], model: ModelFacts) -> GgmlType:
        embedding = tensor in ("token_embd.weight", "per_layer_token_embd.weight")
        if tensor == "output.weight" or (model.tied and embedding):
            return self._head(shape, model)
        if self.name == "MXFP4_MOE":
            return _T.MXFP4 if len(shape) == 3 and shape[0] > 1 else _T.Q8_0
        if embedding and self.name == "MXFP4":
            return _T.Q8_0
        if embedding:
            return _EMBEDDING.get(self.name, self.base)
        role = next((role for part, role in _ROLES if part in tensor), None)
        layer = _layer_of(tensor)
        if role == "o":
            return self._output(model)
        if self.name in _LOW:
            # llama.cpp counts tensors here, not layers.
            return self._low(role, model.downs * layer + ("_shexp" in tensor), model)
        if role in ("v", "qkv"):
            return self._values(layer, model)
        if role == "k" and model.experts == 8:
            return _T.Q8_0
        if role in ("q", "k"):
            return {"IQ3_XXS": _T.IQ2_S, "IQ3_XS": _T.IQ3_XXS}.get(self.name, self.base)
        if role == "down":
            return self._down(layer, model)
        if role in ("up", "gate") and self.name == "IQ3_XS":
            return _T.IQ3_XXS if model.layers // 8 <= layer < 7 * model.layers // 8 else _T.IQ3_S
        return self.base

    def _head(self, shape: tuple[int, ...], model: ModelFacts) -> GgmlType:
        if self.base is _T.MXFP4 or model.architecture == "falcon" or shape[-1] % self.base.block_elements:
            return _T.Q8_0
        if self.name in _LOW or self.name == "IQ3_XXS":
            return _T.Q5_K
        return _T.Q8_0 if self.base is _T.Q8_0 else _T.Q6_K

    def _low(self, role: str | None, number: int, model: ModelFacts) -> GgmlType:
        """All but the ends and the attention's output in mixtures of IQ1 and IQ2; `number` counts tensors of a role."""
        raised = _T.IQ3_S if self.name in _WITH_IQ3_S else _T.Q2_K
        if role in ("v", "qkv"):
            return _T.Q4_K if model.shared or model.experts >= 4 else raised
        if role == "k" and model.experts == 8:
            return _T.Q4_K
        return raised if role == "down" and number < model.layers // 8 else self.base

    def _values(self, layer: int, model: ModelFacts) -> GgmlType:
        """The values' projection, alone or with queries and keys."""
        kind = self.base
        if self.name == "Q2_K":
            kind = _T.Q4_K if model.shared else _T.Q3_K
        elif self.name == "IQ3_M" or (self.name in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and model.shared):
            kind = _T.Q4_K
        elif self.name == "Q3_K_M":
            kind = _T.Q5_K if layer < 2 else _T.Q4_K
        elif self.name == "Q3_K_L" or (self.name in ("IQ4_NL", "IQ4_XS") and model.shared):
            kind = _T.Q5_K
        elif self.name in ("Q4_K_M", "Q5_K_M") and _deserves_more(layer, model.layers):
            kind = _T.Q6_K
        elif self.name == "Q4_K_S" and layer < 4:
            kind = _T.Q5_K
        if model.is_70b and kind in (_T.Q3_K, _T.Q4_K):
            kind = _T.Q5_K
        return _T.Q8_0 if model.experts == 8 else kind

    def _output(self, model: ModelFacts) -> GgmlType:
        """The attention's output projection."""
        if model.architecture == "falcon" and self.name not in _LOW:
            return _T.Q4_K if self.name == "Q3_K_L" else self.base
        if model.experts == 8:
            return _T.Q5_K if self.name in _OUTPUT_OF_EIGHT else self.base
        return _OUTPUT.get(self.name, self.base)

    def _down(self, layer: int, model: ModelFacts) -> GgmlType:
        """The MLP's way down."""
        falcon, more = model.architecture == "falcon", _deserves_more(layer, model.layers)
        eighth, sixteenth = layer < model.layers // 8, layer < model.layers // 16
        if self.name == "Q2_K":
            return _T.Q3_K
        if self.name == "Q3_K_M":
            return _T.Q5_K if sixteenth else _T.Q4_K if not falcon or more else _T.Q3_K
        if self.name == "Q3_K_L":
            return _T.Q4_K if falcon else _T.Q5_K
        if self.name == "Q4_K_M" and falcon:
            return _T.Q6_K if sixteenth else _T.Q5_K if more else _T.Q4_K
        if self.name in ("Q4_K_M", "Q5_K_M") and more:
            return _T.Q6_K
        if self.name == "IQ3_M" and model.experts == 8 and more:
            return _T.Q4_K
        return self._first_down(falcon) if eighth else self.base

    def _first_down(self, falcon: bool) -> GgmlType:
        """The way down in the first eighth of the layers."""
        if self.name in ("Q2_K_S", "IQ3_M"):
            return _T.Q4_K
        if self.name == "Q4_K_S":
            return self.base if falcon else _T.Q5_K
        if self.importance:
            return {"Q4_0": _T.Q4_1, "Q5_0": _T.Q5_1}.get(self.name, self.base)
        return _T.Q5_K if self.name in ("IQ4_NL", "IQ4_XS") else self.base


def mixture(name: str, *, importance: bool = False) -> Mixture:
    """The mixture called `name`, in any case.

    Args:
        importance: whether weights will be made with calibration data, or have been.

    Raises:
        FormatError: there is none.
        PlanError: it is one of :data:`NEED_IMPORTANCE`, and there is none.
    """
    key = mixture_name(name)
    if key not in _NAMES:
        raise FormatError("GGUF has no such mixture of types to write", found=repr(name)[:40], expected=list(MIXTURES))
    if key in NEED_IMPORTANCE and not importance:
        raise PlanError(
            f"{key} isn't made of weights alone, neither here nor in llama.cpp: give calibration data (lowbit quantize "
            f"MODEL OUT --method gguf:{key} --dataset FILE), or choose Q2_K, IQ3_S or a larger one"
        )
    return Mixture(key, *_NAMES[key], importance)


def mixture_name(name: str) -> str:
    """A mixture's name in capitals and without aliases, whether there is one or not."""
    key = name.upper() if isinstance(name, str) else ""
    return _ALIASES.get(key, key)


def is_quantized(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes a tensor of this name and shape at all."""
    if len(shape) < 2 or not tensor.endswith("weight") or tensor in _KEPT_NAMES:
        return False
    if "time_mix_" in tensor:
        return any(f"time_mix_{part}.weight" in tensor for part in _RWKV_LARGE)
    return not any(part in tensor for part in _KEPT)


def fitting(kind: GgmlType, width: int) -> GgmlType:
    """`kind`, or what llama.cpp takes instead for rows of `width` that aren't whole blocks of it."""
    if width % kind.block_elements:
        kind = _NARROW.get(kind, _T.F16)
    return _T.F16 if width % kind.block_elements else kind


def _deserves_more(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _layer_of(tensor: str) -> int:
    match = _LAYER.match(tensor)
    return int(match[1]) if match else 0
