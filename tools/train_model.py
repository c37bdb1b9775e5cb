"""Train a small Llama-architecture language model from packed tokens, inside a wall-clock budget.

    python tools/train_model.py --data ARCHIVES --out OUT --arch small --minutes 1.5

``--minutes`` counts from the start of this script to "everything saved and checked"; the learning rate follows the
clock. The model is a plain-PyTorch Llama whose state dict has the Hugging Face names. It is saved first (bf16
safetensors); then it is loaded into transformers' LlamaForCausalLM, compared with the trained one, quantized by
rounding, and sampled from.

An archive folder holds:

- ``order.npy``: a permutation of the token ids. Archives store ranks in it (frequent first, which packs better).
- ``[0-9]*.xz``: training tokens, LZMA of little-endian uint16 ranks.
- ``eval_NAME.xz``: the same for a text to evaluate on; at least one in the first folder.
"""
# ruff: noqa: E402, RUF100  (the clock and the environment come before the slow imports)

import time

START = time.time()

import argparse
import json
import lzma
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

VOCABULARY, CONTEXT, ROPE_THETA, NORM_EPS = 8192, 1024, 10000.0, 1e-5
SHIPPED_TOKENIZER = Path(__file__).resolve().parents[1] / "src/lowbit/assets/small"

Tokens = np.ndarray  # ids, one dimension
LogitsOf = Callable[[Tensor], Tensor]  # ids [batch, seq] -> logits [batch, seq, VOCABULARY]


@dataclass(frozen=True)
class Architecture:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    learning_rate: float

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


ARCHITECTURES = {
    "base": Architecture(512, 1536, layers=8, heads=8, kv_heads=4, learning_rate=2.5e-3),
    "small": Architecture(256, 768, layers=4, heads=4, kv_heads=2, learning_rate=4e-3),
    "tiny": Architecture(64, 128, layers=2, heads=4, kv_heads=2, learning_rate=4e-3),  # a smoke test for the CPU
}


def log(*parts: object) -> None:
    print(f"[{time.time() - START:6.1f}s]", *parts, flush=True)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype) * self.weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, the "rotate half" convention: x [batch, heads, seq, head_dim], cos and sin [seq, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = arch.heads, arch.kv_heads, arch.head_dim
        self.q_proj = nn.Linear(arch.hidden, arch.heads * arch.head_dim, bias=False)
        self.k_proj = nn.Linear(arch.hidden, arch.kv_heads * arch.head_dim, bias=False)
        self.v_proj = nn.Linear(arch.hidden, arch.kv_heads * arch.head_dim, bias=False)
        self.o_proj = nn.Linear(arch.heads * arch.head_dim, arch.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, seq, hidden] -> [batch, seq, hidden]"""
        batch, seq, _ = x.shape

        def split(projected: Tensor, heads: int) -> Tensor:  # -> [batch, heads, seq, head_dim]
            return projected.view(batch, seq, heads, self.head_dim).transpose(1, 2)

        query = rotate(split(self.q_proj(x), self.heads), cos, sin)
        key = rotate(split(self.k_proj(x), self.kv_heads), cos, sin)
        value = split(self.v_proj(x), self.kv_heads)
        repeats = self.heads // self.kv_heads
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, self.heads * self.head_dim))


class MLP(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden, arch.intermediate, bias=False)
        self.up_proj = nn.Linear(arch.hidden, arch.intermediate, bias=False)
        self.down_proj = nn.Linear(arch.intermediate, arch.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.self_attn = Attention(arch)
        self.mlp = MLP(arch)
        self.input_layernorm = RMSNorm(arch.hidden)
        self.post_attention_layernorm = RMSNorm(arch.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Its state dict has Hugging Face's names less the leading ``model.``; the head is tied to the embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.residual_dtype = torch.bfloat16  # of the stream between blocks, under autocast
        self.embed_tokens = nn.Embedding(VOCABULARY, arch.hidden)
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch.layers))
        self.norm = RMSNorm(arch.hidden)
        frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim)
        angles = torch.outer(torch.arange(CONTEXT, dtype=torch.float32), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)  # [CONTEXT, head_dim]
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * arch.layers) if adds_to_residual else 0.02)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [batch, seq] -> [batch, seq, VOCABULARY]"""
        x = self.embed_tokens(ids).to(self.residual_dtype)
        cos, sin = (table[: ids.shape[1]].to(x.dtype) for table in (self.cos, self.sin))
        for block in self.layers:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids and targets [batch, seq] -> the mean cross-entropy"""
        return F.cross_entropy(self.logits(ids).view(-1, VOCABULARY).float(), targets.reshape(-1))


def unpack(path: Path, order: Tokens) -> Tokens:
    return order[np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")]


def load_tokens(folders: list[Path]) -> tuple[Tokens, dict[str, Tokens]]:
    """-> the ids to train on, and the ids of each text to evaluate on"""
    archives = []
    for folder in folders:
        order = np.load(folder / "order.npy")
        found = sorted(folder.glob("[0-9]*.xz"))
        if not found:
            raise SystemExit(f"no training archives in {folder}")
        archives += [(path, order) for path in found]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 4)) as pool:
        parts = list(pool.map(lambda archive: unpack(*archive), archives))
    order = np.load(folders[0] / "order.npy")
    held_out = {path.stem.removeprefix("eval_"): unpack(path, order) for path in sorted(folders[0].glob("eval_*.xz"))}
    if not held_out:
        raise SystemExit(f"nothing to evaluate on (eval_NAME.xz) in {folders[0]}")
    train = np.concatenate(parts)
    if max(int(ids.max()) for ids in (train, *held_out.values())) >= VOCABULARY:
        raise SystemExit(f"the archives hold token ids of {VOCABULARY} or more")
    return train, held_out


class Batches:
    """Random non-overlapping windows: each token once per epoch, with a new offset every epoch."""

    def __init__(self, ids: Tokens, seq_len: int, device: str, seed: int) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.seq_len = seq_len
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = -1
        self._shuffle()

    def _shuffle(self) -> None:
        self.epoch += 1
        offset = int(torch.randint(0, self.seq_len, (1,), generator=self.generator))
        self.windows = self.ids[offset:].unfold(0, self.seq_len + 1, self.seq_len)  # the last token: only a target
        self.order = torch.randperm(len(self.windows), generator=self.generator).to(self.ids.device)
        self.position = 0

    def take(self, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both [size, seq_len]."""
        if self.position + size > len(self.order):
            self._shuffle()
        tokens = self.windows[self.order[self.position : self.position + size]].long()
        self.position += size
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@torch.no_grad()
def perplexity(logits_of: LogitsOf, ids: Tokens, seq_len: int, device: str, max_windows: int | None = None) -> float:
    """Over non-overlapping windows of seq_len tokens; a window's own first token is not scored."""
    count = min(len(ids) // seq_len, max_windows or len(ids))
    windows = torch.from_numpy(ids[: count * seq_len].astype(np.int64)).view(count, seq_len)
    total = 0.0
    for batch in windows.split(32):
        batch = batch.to(device)
        logits, targets = logits_of(batch)[:, :-1], batch[:, 1:]
        total += F.cross_entropy(logits.reshape(-1, VOCABULARY).float(), targets.reshape(-1), reduction="sum").item()
    return math.exp(min(20.0, total / (count * (seq_len - 1))))


def round_to_nearest(weight: Tensor, bits: int, group: int = 128) -> Tensor:
    """The weight [rows, columns] after min/max rounding per group of a row, with an integer zero point."""
    groups = weight.float().view(weight.shape[0], -1, min(group, weight.shape[1]))
    levels = 2**bits - 1
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / levels).clamp(min=1e-8)
    zero = torch.round(-low / scale)
    codes = torch.clamp(torch.round(groups / scale) + zero, 0, levels)
    return ((codes - zero) * scale).view_as(weight).to(weight.dtype)


def hf_config(arch: Architecture) -> dict[str, object]:
    # fmt: off
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": arch.hidden, "intermediate_size": arch.intermediate, "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads, "num_key_value_heads": arch.kv_heads, "head_dim": arch.head_dim,
        "hidden_act": "silu", "max_position_embeddings": CONTEXT, "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA, "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "dtype": "bfloat16", "torch_dtype": "bfloat16",
    }
    # fmt: on


def split_into_shards(sizes: dict[str, int], limit: int, header: int = 64 * 1024) -> list[list[str]]:
    """Names in as few shards as stay under ``limit`` bytes each, filled evenly, largest tensor first."""
    if max(sizes.values()) + header > limit:
        raise SystemExit(f"a tensor of {max(sizes.values())} bytes doesn't fit a shard of {limit}")
    count = max(1, math.ceil((sum(sizes.values()) + header) / (limit - header)))
    while True:
        shards: list[list[str]] = [[] for _ in range(count)]
        filled = [0] * count
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            emptiest = filled.index(min(filled))
            shards[emptiest].append(name)
            filled[emptiest] += sizes[name]
        if max(filled) + header <= limit:
            return shards
        count += 1


def save_model(model: Llama, arch: Architecture, tokenizer: Path, out: Path, limit: int = 15 * 2**20) -> None:
    """Write config, tokenizer and bf16 shards without transformers, which only checks them afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(hf_config(arch), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, out / name)
    state = {f"model.{name}": t.detach().to("cpu", torch.bfloat16) for name, t in model.state_dict().items()}
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    shards = split_into_shards(sizes, limit)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file, shard in zip(files, shards, strict=True):
        save_file({name: state[name] for name in shard}, out / file, metadata={"format": "pt"})
    for path in sorted(out.iterdir()):
        path.chmod(0o644)
        log("  saved", path.name, path.stat().st_size)


def scheduled_rate(peak: float, progress: float, warmup: float, step: int) -> float:
    """Linear warm-up over the first ``warmup`` of the budget (and 100 steps at least), then cosine down to 2 %."""
    if progress < warmup:
        rate = peak * min(1.0, (progress + 1e-4) / warmup)
    else:
        rate = peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))))
    return min(rate, peak * (step + 1) / 100)


def make_optimizer(model: Llama, peak: float, decay: float, fused: bool) -> torch.optim.AdamW:
    """Weight decay for the linears only."""
    named = [(parameter.dim() == 2 and "embed" not in name, parameter) for name, parameter in model.named_parameters()]
    decayed, free = ([parameter for is_linear, parameter in named if is_linear == wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8, fused=fused)


class Trainer:
    tokens: Tokens
    held_out: dict[str, Tokens]

    def __init__(self, model: Llama, arch: Architecture, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.on_gpu = options.device.startswith("cuda")
        self.peak = options.lr or arch.learning_rate
        self.optimizer = make_optimizer(model, self.peak, options.wd, fused=self.on_gpu)
        self.micro_batches = max(1, round(options.batch_tokens / (options.micro * options.seq)))
        self.step_tokens = self.micro_batches * options.micro * options.seq
        self.loss_of: Callable[[Tensor, Tensor], Tensor] = model
        self.step = self.skipped = 0
        self.last_loss: float | None = None

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.options.device.split(":")[0], dtype=torch.bfloat16)

    def warm_up(self) -> None:
        """Compile, and run one step on random tokens; its gradients are thrown away."""
        options = self.options
        ids, targets = torch.randint(0, VOCABULARY, (2, options.micro, options.seq), device=options.device)
        if self.on_gpu if options.compile is None else options.compile:
            self.loss_of = torch.compile(self.model, dynamic=False)
        with self.autocast():
            loss = self.loss_of(ids, targets)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        log(f"random-token loss {loss.item():.3f} (ln V = {math.log(VOCABULARY):.3f})")

    def train_step(self, batches: Batches, rate: float) -> tuple[Tensor, float]:
        """-> the loss, left on the device, and the gradient norm"""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.options.device)
        for _ in range(self.micro_batches):
            ids, targets = batches.take(self.options.micro)
            with self.autocast():
                loss = self.loss_of(ids, targets) / self.micro_batches
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    def train(self, deadline: float) -> None:
        """Until the deadline or --max-steps, whichever is nearer at each step."""
        options, began = self.options, time.time()
        budget = max(1e-9, deadline - began)
        batches = Batches(self.tokens, options.seq, options.device, options.seed)
        if len(batches.order) < options.micro or min(map(len, self.held_out.values())) < options.seq:
            raise SystemExit("too little data")
        log(f"training for {budget:.0f} s; {self.step_tokens} tokens a step, peak rate {self.peak:g}")
        self.model.train()
        losses: list[Tensor] = []
        logged = evaluated = began
        while (spent := max((time.time() - began) / budget, self.step / options.max_steps)) < 1:
            rate = scheduled_rate(self.peak, spent, options.warmup, self.step)
            loss, norm = self.train_step(batches, rate)
            losses.append(loss)
            if time.time() - logged > 10 or self.step == 1:
                self.last_loss = torch.stack(losses).mean().item()
                speed = len(losses) * self.step_tokens / (time.time() - logged)
                log(
                    f"step {self.step} {spent:.1%} rate {rate:.2e} loss {self.last_loss:.4f} gradient {norm:.2f}"
                    f" epoch {batches.epoch} skipped {self.skipped} {speed / 1e3:.0f}k tokens/s"
                )
                losses, logged = [], time.time()
            if time.time() - evaluated > options.eval_every:
                self.evaluate()
                evaluated = time.time()
        seen = self.step * self.step_tokens
        log(f"trained {self.step} steps, {seen / 1e6:.1f}M tokens, {seen / len(self.tokens):.2f} epochs")

    def evaluate(self) -> dict[str, float]:
        options = self.options
        self.model.eval()
        with self.autocast():
            results = {
                name: round(perplexity(self.model.logits, ids, options.seq, options.device, options.eval_windows), 3)
                for name, ids in self.held_out.items()
            }
        self.model.train()
        log("perplexity (autocast):", results)
        return results


@torch.no_grad()
def check_reload(model: Llama, reloaded: nn.Module, ids: Tensor) -> None:
    """The saved model, in transformers, gives the trained model's fp32 logits on ids [batch, seq]."""
    model.eval()
    model.residual_dtype = torch.float32
    model.load_state_dict({name: t.to(torch.bfloat16).float() for name, t in model.state_dict().items()})
    torch.set_float32_matmul_precision("highest")
    difference = (reloaded(ids).logits - model.logits(ids)).abs().max().item()
    torch.set_float32_matmul_precision("high")
    log(f"reloaded in transformers vs trained, max |logit difference| {difference:.2e} (fp32)")
    if difference >= 2e-2:
        raise SystemExit("MISMATCH: transformers reads another model than the one that was trained")


@torch.no_grad()
def report_rounding(reloaded: nn.Module, measure: Callable[[LogitsOf], float], deadline: float) -> None:
    """Perplexity of the saved model as it is and with the blocks' linears rounded, as long as time is left."""

    def logits_of(ids: Tensor) -> Tensor:
        return reloaded(ids).logits

    log(f"  saved model: perplexity {measure(logits_of):.3f}")
    linears = [m for name, m in reloaded.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    originals = [linear.weight.clone() for linear in linears]
    for bits in (8, 4, 3, 2):
        if time.time() > deadline:
            break
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.copy_(round_to_nearest(original, bits))
        log(f"  round-to-nearest, {bits} bits, group 128: perplexity {measure(logits_of):.3f}")
    for linear, original in zip(linears, originals, strict=True):
        linear.weight.copy_(original)


def check_saved(trainer: Trainer, deadline: float) -> None:
    options, device = trainer.options, trainer.options.device
    reloaded = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(device).eval()
    ids = torch.from_numpy(trainer.tokens[:512].astype(np.int64)).view(2, 256).to(device)
    check_reload(trainer.model, reloaded, ids)
    if trainer.on_gpu or options.arch == "tiny":
        name = "wt2_test_raw" if "wt2_test_raw" in trainer.held_out else next(iter(trainer.held_out))
        measure = partial(perplexity, ids=trainer.held_out[name], seq_len=options.seq, device=device)
        reloaded = reloaded.to(torch.bfloat16 if trainer.on_gpu else torch.float32)
        log(f"on {name}, in {reloaded.dtype}:")
        report_rounding(reloaded, partial(measure, max_windows=options.eval_windows), deadline - 6)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    for prompt in ("The city of London is", "In 1969, the first"):
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        inputs = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        output = reloaded.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=2)
        log("greedy:", repr(tokenizer.decode(output[0], skip_special_tokens=True)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="archive folders")
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED_TOKENIZER, help="folder to copy the tokenizer from")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the model in")
    parser.add_argument("--arch", default="small", choices=list(ARCHITECTURES))
    parser.add_argument("--minutes", type=float, default=8.0, help="wall clock, from the start until all is saved")
    parser.add_argument("--reserve", type=float, default=35.0, help="seconds kept for the save and the checks")
    parser.add_argument("--seq", type=int, default=CONTEXT, help="tokens in a sequence")
    parser.add_argument("--batch-tokens", type=int, default=262144, help="tokens in an optimizer step")
    parser.add_argument("--micro", type=int, default=128, help="sequences in a micro-batch")
    parser.add_argument("--lr", type=float, default=0.0, help="peak learning rate; 0: the architecture's own")
    parser.add_argument("--wd", type=float, default=0.1, help="weight decay of the linears")
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the budget")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eval-every", type=float, default=60.0, help="seconds between evaluations")
    parser.add_argument("--eval-windows", type=int, default=None, help="evaluate on so many windows at most")
    options = parser.parse_args()
    if not 2 <= options.seq <= CONTEXT:
        parser.error(f"--seq must be from 2 to {CONTEXT}")
    return options


def main() -> None:
    options = parse_options()
    deadline = START + options.minutes * 60
    arch = ARCHITECTURES[options.arch]
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    log("torch", torch.__version__, options)
    with ThreadPoolExecutor(1) as pool:
        unpacking = pool.submit(load_tokens, options.data)  # while the model compiles
        model = Llama(arch).to(options.device)
        log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters (tied embeddings)")
        trainer = Trainer(model, arch, options)
        trainer.warm_up()
        trainer.tokens, trainer.held_out = unpacking.result()
    sizes = {name: len(ids) for name, ids in trainer.held_out.items()}
    log(f"{len(trainer.tokens) / 1e6:.2f}M tokens to train on; to evaluate on: {sizes}")
    trainer.train(deadline - options.reserve)
    if trainer.on_gpu:
        log(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    save_model(model, arch, options.tokenizer, options.out)  # on disk first, checks after
    final = trainer.evaluate()
    check_saved(trainer, deadline)
    summary = {"arch": options.arch, "steps": trainer.step, "tokens": trainer.step * trainer.step_tokens}
    log("RESULT", json.dumps(summary | {"skipped": trainer.skipped, "loss": trainer.last_loss, "perplexity": final}))


if __name__ == "__main__":
    main()
