"""What other methods have cost on one model: round marks to hold a checkpoint against, never a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Of benchmarks/results/quality_base_nvidia_h200.json: WikiText-2's test file in windows of 1024 tokens, only the
# blocks' linear layers quantized.
MEASURED_ON: Final = "a Llama of 29M parameters on WikiText-2, without calibration"
DENSE: Final = 24.7158


@dataclass(frozen=True)
class Figure:
    """A measured point.

    Attributes:
        title: for people.
        row: what the results call it.
        bits: per weight of the blocks' linear layers.
        perplexity: with them.
    """

    title: str
    row: str
    bits: float
    perplexity: float

    @property
    def growth(self) -> float:
        """Of the perplexity, in percent."""
        return 100 * (self.perplexity / DENSE - 1)


FIGURES: Final = (
    Figure("GGUF Q8_0", "gguf Q8_0", 8.5, 24.7231),
    Figure("LLM.int8()", "bitsandbytes int8, threshold 6", 8.0521, 24.7307),
    Figure("FP8", "compressed-tensors FP8_DYNAMIC", 8.0521, 24.823),
    Figure("GGUF Q6_K", "gguf Q6_K", 6.5625, 24.7251),
    Figure("GGUF Q5_K_M", "gguf Q5_K_M", 5.6549, 24.7542),
    Figure("round-to-nearest, 5 bits", "compressed-tensors 5 bits g128", 5.2956, 24.9478),
    Figure("GGUF Q4_K_M", "gguf Q4_K_M", 4.8008, 25.0763),
    Figure("GGUF Q4_0", "gguf Q4_0", 4.5, 25.3602),
    Figure("NF4", "bitsandbytes nf4", 4.5011, 25.4684),
    Figure("GGUF IQ4_XS", "gguf IQ4_XS", 4.2902, 25.3087),
    Figure("round-to-nearest, 4 bits", "gptq 4 bits g128", 4.1875, 25.7465),
    Figure("NF4, nested scales", "bitsandbytes nf4, nested", 4.1464, 25.4655),
    Figure("GGUF Q3_K_M", "gguf Q3_K_M", 3.8464, 25.9902),
    Figure("round-to-nearest, 3 bits", "gptq 3 bits g128", 3.1549, 31.069),
    Figure("GGUF Q2_K", "gguf Q2_K", 2.9297, 31.6562),
    Figure("round-to-nearest, 2 bits", "gptq 2 bits g64", 2.2812, 120.7765),
)
