"""Sample, once, the text that the shipped model is measured on: its own.

    python tools/sample_text.py            (writes src/lowbit/assets/sample.txt and sample.json)

The perplexity of a model on text drawn from itself is (the exponential of) its entropy, which no other model can
beat in expectation. What a quantized copy loses on that text estimates its divergence from the original and nothing
else, where on other people's text a copy may lose less, or even gain, by chance.

That holds for the windows the text is scored in, so the text is drawn in those: 24 windows of 256 tokens, each drawn
on its own, in fp32 at temperature 1, and joined without a separator. A window's first token is a line feed and isn't
drawn; its other 255 are, each from the model's distribution after the tokens before it in its window. Scored as

    ids = tokenizer(text, add_special_tokens=False).input_ids     (the text as read, not stripped)
    non-overlapping windows of 256 ids, each predicting its ids 2 to 256

every token is predicted from just the context that it was drawn with. Other window lengths cut across the drawn
ones: good to compare models by, but the loss of the original is then more than its entropy.

Only windows that survive the way through text are taken: the text so far with the window's own, tokenized, must give
the very ids. That leaves out windows with special tokens (the end of a document) or invalid UTF-8, and those where
the model drew a word in other pieces than the tokenizer would cut. The bias: the windows come from the model's
distribution conditional on acceptance. With an acceptance rate A, a copy that matched that conditional distribution
would score -ln A nats a window better than the original, and none can do more in expectation. The script prints A
and that bound per token, as well as the standard error of the finite draw: the bound is well under what rounding to
4 bits costs (0.08 nats per token), and over what rounding to 8 bits costs, which this text can't tell from nothing.

The seed fixes the draw on one machine; on another, floating-point rounding may pick another token somewhere, and so
another text. Hence the text itself is kept, and not just this script.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).resolve().parents[1] / "src/lowbit/assets"
FIRST_TOKEN = "\n"


@torch.no_grad()
def draw_windows(model: PreTrainedModel, first: int, count: int, length: int, generator: torch.Generator) -> Tensor:
    """-> ids [count, length]: ``first``, then a draw from the model after each prefix"""
    ids = torch.full((count, 1), first)
    cache = None
    for _ in range(length - 1):
        output = model(ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        drawn = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, drawn), 1)
    return ids


@torch.no_grad()
def score(model: PreTrainedModel, windows: Tensor) -> tuple[Tensor, Tensor]:
    """windows [n, length] -> the negative log-likelihood of ids 2 to length, and the entropy of each prediction

    Both [n, length - 1], in nats.
    """
    losses, entropies = [], []
    for batch in windows.unbind():
        log_p = model(batch[None]).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log_p.gather(1, batch[1:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.stack(losses), torch.stack(entropies)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def survives(tokenizer: PreTrainedTokenizerBase, taken: list[int], window: list[int]) -> bool:
    """Whether the window, put after what was taken, comes back from text as the same ids, and as readable text."""
    text = decode(tokenizer, taken + window)
    special = set(tokenizer.all_special_ids) & set(window)
    return not special and "\r" not in text and encode(tokenizer, text) == taken + window  # \r: lost in text mode


def candidates(model: PreTrainedModel, first: int, length: int, seed: int, batch: int = 16) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from draw_windows(model, first, batch, length, generator).tolist()


def collect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int
) -> tuple[list[int], int]:
    """-> the ids of ``count`` windows that survive, one after another, and how many were drawn for them"""
    (first,) = encode(tokenizer, FIRST_TOKEN)
    windows = candidates(model, first, length, seed)
    taken: list[int] = []
    drawn = 0
    while len(taken) < count * length:
        window = next(windows)
        drawn += 1
        if survives(tokenizer, taken, window):
            taken += window
    return taken, drawn


def report(losses: Tensor, entropies: Tensor, drawn: int) -> None:
    windows, predicted = losses.shape
    acceptance = windows / drawn
    error = losses.mean(1).std().item() / math.sqrt(windows)
    print(f"windows drawn {drawn}, taken {windows}: acceptance {acceptance:.3f}")
    print(f"bound of the bias {-math.log(acceptance) / predicted:.5f} nats per token")
    print(f"entropy, from the drawn tokens {losses.mean():.4f} +- {error:.4f} nats per token")
    print(f"entropy, of the distributions they were drawn from {entropies.mean():.4f} nats per token")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "small")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for sample.txt and sample.json")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    taken, drawn = collect(model, tokenizer, options.windows, options.seq_len, options.seed)
    path = options.out / "sample.txt"
    path.write_text(decode(tokenizer, taken), encoding="utf-8", newline="\n")

    losses, entropies = score(model, torch.tensor(taken).view(-1, options.seq_len))
    report(losses, entropies, drawn)
    ids = encode(tokenizer, path.read_text(encoding="utf-8"))  # from here on as an evaluation sees it
    same = sum(a == b for a, b in zip(ids, taken, strict=False))
    print(f"tokens {len(taken)}, read back from the file {len(ids)}, the same {same}")
    losses, _ = score(
        model, torch.tensor(ids[: len(ids) // options.seq_len * options.seq_len]).view(-1, options.seq_len)
    )
    perplexity = losses.mean().exp().item()
    print(f"perplexity of the file in windows of {options.seq_len}: {perplexity:.4f}")
    facts = {"tokens": len(ids), "seed": options.seed, "seq_len": options.seq_len, "perplexity": round(perplexity, 4)}
    (options.out / "sample.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
