"""Transformers: `register` hands it our quantizers; the Auto classes use them without registering anything."""

from lowbit.integrations.transformers.auto import auto_class
from lowbit.integrations.transformers.gguf.loading import AutoConfig, AutoTokenizer
from lowbit.integrations.transformers.methods.aqlm import AqlmConfig
from lowbit.integrations.transformers.methods.awq import AwqConfig
from lowbit.integrations.transformers.methods.bitsandbytes import BitsAndBytesConfig
from lowbit.integrations.transformers.methods.compressed_tensors import CompressedTensorsConfig
from lowbit.integrations.transformers.methods.eetq import EetqConfig
from lowbit.integrations.transformers.methods.fbgemm_fp8 import FbgemmFp8Config
from lowbit.integrations.transformers.methods.gguf import GgufConfig
from lowbit.integrations.transformers.methods.gptq import GPTQConfig
from lowbit.integrations.transformers.methods.hqq import HqqConfig
from lowbit.integrations.transformers.methods.quanto import QuantoConfig
from lowbit.integrations.transformers.methods.torchao import TorchAoConfig
from lowbit.integrations.transformers.recipe import Recipe
from lowbit.integrations.transformers.register import register, register_method, unregister, unregister_method

__all__ = [
    "AqlmConfig",
    "AutoConfig",
    "AutoTokenizer",
    "AwqConfig",
    "BitsAndBytesConfig",
    "CompressedTensorsConfig",
    "EetqConfig",
    "FbgemmFp8Config",
    "GPTQConfig",
    "GgufConfig",
    "HqqConfig",
    "QuantoConfig",
    "Recipe",
    "TorchAoConfig",
    "auto_class",
    "register",
    "register_method",
    "unregister",
    "unregister_method",
]
