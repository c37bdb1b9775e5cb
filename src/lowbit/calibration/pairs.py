"""Which channels of a block can be scaled without changing what it computes, found by trying.

Dividing the output channels of a module by ``s`` and multiplying the input columns of what reads them by ``s`` changes
nothing where everything between the two is linear in each channel: a norm and the linear layers behind it, values and
the projection behind attention, the ungated half of a gated MLP and what follows, two layers with a ReLU between them.
AWQ (arXiv:2306.00978) and SmoothQuant (arXiv:2211.10438) list such pairs for each architecture; here a block is run on
a small input, candidates are found by what its modules were seen to take and give, and each is applied to a copy of the
block and kept if the block's output stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.calibration.matrices import Matrix, matrices, norms, own_bias
from lowbit.calibration.replay import Call, Replay, distance
from lowbit.errors import PlanError

# A probe multiplies row r by 1 + digit / 4, where the digit is that of r + 1 in base 8: a few probes tell which row has
# reached which column, and by factors so far apart that fp32, and bf16, can't confuse them.
_BASE: Final = 8
_STEP: Final = 0.25
_DIGIT_TOLERANCE: Final = 0.02
_PROPORTIONAL: Final = 1e-3
# Scaling both sides has to undo what scaling one side does, up to this part of it. Measured on 110 candidates of 30
# tiny models: true pairs leave at most 4e-7 (most nothing at all), false ones at least 0.85.
_REMAINS: Final = 1e-3
_FEW: Final = 24  # linear layers in a block of which all combinations are tried


@dataclass(frozen=True)
class Pair:
    """Channels that can be scaled, by the names of :func:`lowbit.calibration.matrices.matrices`.

    Attributes:
        source: the norm or the matrix whose output channels are divided by the scales.
        kind: which of the two it is.
        targets: the matrices whose input columns are multiplied by them.
        repeat: how many columns of a target one channel reaches (grouped-query attention), at most.
        rows: ``int64 [in]``: the channel that reaches each column of the targets, -1 for columns that can't be scaled.
        offset: what is added to a norm's weight before it is used: 1 for Gemma's.
    """

    source: str
    kind: Literal["norm", "linear"]
    targets: tuple[str, ...]
    repeat: int = 1
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), compare=False, repr=False)
    offset: float = 0.0

    def tie(self, scales: Tensor) -> Tensor:
        """The nearest ``scales [in]`` that the pair can take: columns of one channel get their geometric mean."""
        rows = self.rows.to(scales.device)
        used = rows >= 0
        sums = torch.zeros(int(rows.max()) + 1, device=scales.device).index_add_(0, rows[used], scales[used].log())
        counts = torch.bincount(rows[used], minlength=len(sums))
        means = (sums / counts.clamp(min=1)).exp()
        return torch.where(used, means[rows.clamp(min=0)], 1.0)


def find_pairs(block: nn.Module, run: Callable[[], object]) -> list[Pair]:
    """Find the pairs of a block, in order of execution.

    Args:
        block: a decoder layer, or any other module, with its weights; it is copied in fp32 and left as it is.
        run: calls the block once on a small real input, of two or more sequences of some tens of tokens.

    Raises:
        PlanError: the block can't be run twice with the same result (see :class:`lowbit.calibration.replay.Replay`).
    """
    return pairs_of(Replay(block, run))


def pairs_of(replay: Replay) -> list[Pair]:
    """:func:`find_pairs` of a block that is copied already; the copy is left as it is."""
    calls = replay.record()
    known = matrices(replay.block)
    order = {name: position for position, name in enumerate(calls)}
    pairs = [*_norm_pairs(replay, calls, known), *_linear_pairs(replay, calls, known), *_expert_pairs(replay, known)]
    pairs = list({(pair.source, pair.targets): pair for pair in pairs}.values())
    return sorted(pairs, key=lambda pair: min(order.get(known[target].module, len(order)) for target in pair.targets))


@torch.no_grad()
def apply_scales(block: nn.Module, pair: Pair, scales: Tensor) -> None:
    """Divide the channels of a pair's source by `scales` and multiply the columns of its targets, in place.

    Args:
        scales: ``[in]``, positive; see :meth:`Pair.tie`.

    Raises:
        PlanError: a scale is not positive and finite, or columns that belong to one channel differ in theirs.
    """
    if tuple(scales.shape) != tuple(pair.rows.shape):
        raise PlanError(f"the pair of '{pair.source}' has {len(pair.rows)} scales, not {list(scales.shape)}")
    scales = scales.float()
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise PlanError(f"scales of '{pair.source}' are positive and finite; found {float(scales.min()):g}")
    if not torch.allclose(pair.tie(scales), scales, rtol=1e-4, atol=0):
        raise PlanError(f"columns that belong to one channel of '{pair.source}' differ in their scales; use Pair.tie()")
    known = matrices(block)
    _scale_source(block, known, pair, scales)
    _scale_targets(known, pair, scales)


def _scale_targets(known: Mapping[str, Matrix], pair: Pair, scales: Tensor) -> None:
    for target in pair.targets:
        weight = known[target].weight
        weight.copy_(weight.float() * scales.to(weight.device))


def _scale_source(block: nn.Module, known: Mapping[str, Matrix], pair: Pair, scales: Tensor) -> None:
    if pair.kind == "norm":
        module = block.get_submodule(pair.source)
        weight, bias = module.get_parameter("weight").detach(), own_bias(module)
        weight.copy_((weight.float() + pair.offset) / scales.to(weight.device) - pair.offset)
    else:
        weight, bias = known[pair.source].weight, known[pair.source].bias
        by_row = torch.ones(weight.shape[0], device=weight.device)
        used = pair.rows >= 0
        by_row[pair.rows[used].to(weight.device)] = scales[used.to(scales.device)].to(weight.device)
        scales = by_row
        weight.copy_(weight.float() / scales[:, None])
    if bias is not None:
        bias.copy_(bias.float() / scales.to(bias.device))


def _is_invisible(replay: Replay, pair: Pair) -> bool | None:
    """Whether scales leave the output of the copy where it was; None where nothing reaches the output.

    The copy is the same afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    # Powers of two change no bits of what is computed, so that a router's choice among near ties doesn't tip over.
    exponents = torch.randint(-2, 3, pair.rows.shape, generator=generator).float()
    scales = pair.tie(torch.exp2(exponents)).log2().round().exp2().to(replay.hidden.device)
    known = matrices(replay.block)
    before = None
    if pair.kind == "norm":
        before = replay.block.get_submodule(pair.source).get_parameter("weight").detach().clone()
    _scale_targets(known, pair, scales)
    one_side = distance(replay.outputs(), replay.base)
    _scale_source(replay.block, known, pair, scales)
    both = distance(replay.outputs(), replay.base)
    _scale_targets(known, pair, 1 / scales)
    _scale_source(replay.block, known, pair, 1 / scales)
    if before is not None:
        replay.block.get_submodule(pair.source).get_parameter("weight").detach().copy_(before)
    return None if one_side == 0 else both <= _REMAINS * one_side


# ------------------------------------------------------------------------------------------------------ norm -> linear


def _norm_pairs(replay: Replay, calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> Iterator[Pair]:
    for name, norm in norms(replay.block).items():
        if name not in calls:
            continue
        targets = consumers(calls[name].output, calls, known)
        width = norm.get_parameter("weight").numel()
        targets += [other for other in unseen_like(targets, calls, known) if known[other].weight.shape[1] == width]
        offset = norm_offset(norm, calls[name])
        if not targets or offset is None or _might_read(width, targets, calls, known):
            continue
        pair = Pair(name, "norm", tuple(targets), rows=torch.arange(width), offset=offset)
        if _is_invisible(replay, pair):
            yield pair


def consumers(output: Tensor, calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> list[str]:
    """The matrices whose inputs are rows of ``output [..., n]``: all of them, or, of an expert, some."""
    width = output.shape[-1]
    rows = _fingerprints(output).unique()
    modules: dict[str, bool] = {}
    found = []
    for name, matrix in known.items():
        call = calls.get(matrix.module)
        if call is None or matrix.weight.shape[1] != width or call.inputs.shape[-1] != width:
            continue
        if matrix.module not in modules:
            modules[matrix.module] = bool(torch.isin(_fingerprints(call.inputs), rows).all())
        # Of experts, what comes in goes through the first projection.
        if modules[matrix.module] and not (matrix.expert is not None and name.endswith(".down_proj")):
            found.append(name)
    return found


def _fingerprints(tensor: Tensor) -> Tensor:
    """One number per row ``[rows]``; rows with the same bits have the same."""
    # Integers that wrap around: their sum doesn't depend on the order, as a sum of floats does.
    bits = tensor.detach().float().reshape(-1, tensor.shape[-1]).contiguous().view(torch.int32).to(torch.int64)
    odd = torch.randint(1 << 61, (bits.shape[-1],), generator=torch.Generator().manual_seed(1)) * 2 + 1
    return (bits * odd.to(bits.device)).sum(-1)


def norm_offset(norm: nn.Module, call: Call) -> float | None:
    """What a norm adds to its weight before it multiplies with it: 0 or 1; None where it does something else."""
    weight, bias = norm.get_parameter("weight"), own_bias(norm)
    kept = weight.detach().clone()
    shift = 0.0 if bias is None else bias
    given = []
    try:
        for value in (0.0, 1.0):
            weight.detach().fill_(value)
            with torch.no_grad():
                given.append(norm(*call.args, **call.kwargs) - shift)
    finally:
        weight.detach().copy_(kept)
    none, one = given
    if one.shape[-1] != weight.numel():
        return None
    if float(none.abs().max()) == 0:
        return 0.0
    return 1.0 if torch.allclose(one, 2 * none, rtol=1e-4, atol=1e-6) else None


def _might_read(width: int, targets: list[str], calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> bool:
    """Whether a matrix that this run didn't reach, and that is like none of the targets, could read the norm."""
    return any(
        matrix.module not in calls and matrix.weight.shape[1] == width and name not in targets
        for name, matrix in known.items()
        if not _is_like_any(name, calls, known)
    )


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _is_like_any(name: str, calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> bool:
    return any(_pattern(other) == _pattern(name) for other, matrix in known.items() if matrix.module in calls)


def unseen_like(targets: list[str], calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> list[str]:
    """Matrices of experts that saw no token, where their siblings are targets."""
    patterns = {_pattern(target) for target in targets}
    return [name for name, matrix in known.items() if matrix.module not in calls and _pattern(name) in patterns]


# ---------------------------------------------------------------------------------------------------- linear -> linear


class _View(NamedTuple):
    """A part of the rows of a source and of the tokens of a target, in which a pair may show."""

    rows: slice = slice(None)
    first_token: bool = False


def _linear_pairs(replay: Replay, calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> Iterator[Pair]:
    read = {
        target
        for name in norms(replay.block)
        if name in calls
        for target in consumers(calls[name].output, calls, known)
    }
    executed = [name for name in calls if name in known and known[name].linear]
    for target in executed:
        if target in read:
            continue
        for source in _sources(target, executed):
            pair = _probe(replay, known, source, target)
            if pair is not None and _is_invisible(replay, pair):
                yield pair
                yield from _unseen_pairs(pair, calls, known)
                break


def _sources(target: str, executed: list[str]) -> list[str]:
    """What was executed before, the latest first and what lies in the same module before all else."""
    earlier = executed[: executed.index(target)][::-1]
    parent = target.rpartition(".")[0]
    beside = [name for name in earlier if name.rpartition(".")[0] == parent]
    return beside + [name for name in earlier if name not in beside] if len(executed) <= _FEW else beside


def _unseen_pairs(pair: Pair, calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> Iterator[Pair]:
    """The same pair of experts that saw no token."""
    (target,) = pair.targets
    parent = pair.source.rpartition(".")[0]
    for name in unseen_like([target], calls, known):
        source = f"{name.rpartition('.')[0]}.{pair.source.rpartition('.')[2]}"
        alike = source in known and known[source].weight.shape == known[pair.source].weight.shape
        if alike and target.rpartition(".")[0] == parent and known[name].weight.shape == known[target].weight.shape:
            yield replace(pair, source=source, targets=(name,))


def _probe(replay: Replay, known: Mapping[str, Matrix], source: str, target: str) -> Pair | None:
    out_features, in_features = known[source].weight.shape[0], known[target].weight.shape[1]
    if in_features > out_features and in_features % out_features:
        return None
    views = [_View()]
    if out_features > in_features:
        # Queries, keys and values in one: the first token of a causal decoder sees nothing but its own value.
        views.append(_View(first_token=True))
    if out_features == 2 * in_features:
        half = out_features // 2
        views += [_View(slice(half, None)), _View(slice(half)), _View(slice(1, None, 2)), _View(slice(0, None, 2))]
    base = replay.inputs_of(target)
    for view in views:
        rows = _reached(replay, source, target, out_features, base, view)
        if rows is not None:
            return Pair(source, "linear", (target,), int(torch.bincount(rows[rows >= 0]).max()), rows)
    return None


def _reached(replay: Replay, source: str, target: str, count: int, base: Tensor, view: _View) -> Tensor | None:
    """The row of the source that is a factor of each column of the target's input, -1 for none.

    Returns:
        ``int64 [in]`` on the CPU, or None where the input isn't proportional to rows.
    """
    position = torch.arange(1, count + 1)
    numbers = torch.zeros(count, dtype=torch.int64)
    numbers[view.rows] = position[view.rows]
    code, place = torch.zeros(base.shape[-1], dtype=torch.int64), 1
    while place <= count:
        factors = 1 + _STEP * (numbers // place % _BASE)
        with replay.scaled_output(source, factors.to(base)):
            digits = _digits(base, replay.inputs_of(target), first_token=view.first_token)
        if digits is None:
            return None
        code += place * digits
        place *= _BASE
    rows = code - 1
    if not bool((rows < count).all()) or not bool((rows >= 0).any()):
        return None
    dead = base.detach().reshape(-1, base.shape[-1]).abs().amax(0).cpu() == 0
    return _with_dead_columns(rows, dead, count)


def _with_dead_columns(rows: Tensor, dead: Tensor, count: int) -> Tensor:
    """Neurons that a ReLU kept at zero throughout lie between others: where those are in order, so are these."""
    columns = torch.arange(len(rows))
    shifts = (rows - columns)[~dead].unique()
    if not bool(dead.any()) or len(shifts) != 1:
        return rows
    filled = columns + shifts
    return torch.where(dead & (filled >= 0) & (filled < count), filled, rows)


def _digits(base: Tensor, scaled: Tensor, *, first_token: bool) -> Tensor | None:
    """By which of the factors each column has grown; None where one of them has grown by none."""
    if base.shape != scaled.shape:
        return None
    if first_token:
        base, scaled = (tensor[:, 0] if tensor.dim() == 3 else tensor[:1] for tensor in (base, scaled))
    base, scaled = (tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (base, scaled))
    squares = base.square().sum(0)
    factor = (base * scaled).sum(0) / squares.clamp(min=torch.finfo(torch.float64).tiny)
    off = (scaled - factor * base).square().sum(0).sqrt()
    digits = (factor - 1) / _STEP
    is_factor = (digits - digits.round()).abs() < _DIGIT_TOLERANCE
    fits = (off <= _PROPORTIONAL * scaled.square().sum(0).sqrt()) & is_factor
    dead = (squares == 0) & (scaled.square().sum(0) == 0)
    whole = torch.where(dead, 0, digits.round()).to(torch.int64).cpu()
    if bool(dead.all()) or not bool((fits | dead).all()) or not bool(((whole >= 0) & (whole < _BASE)).all()):
        return None
    return whole


def _expert_pairs(replay: Replay, known: Mapping[str, Matrix]) -> Iterator[Pair]:
    """``up_proj`` and ``down_proj`` of fused experts, where what lies between is linear in the former."""
    modules: dict[str, list[Pair]] = {}
    for name, matrix in known.items():
        up = f"{name.rpartition('.')[0]}.up_proj"
        if matrix.expert is not None and name.endswith(".down_proj") and up in known:
            pair = Pair(up, "linear", (name,), rows=torch.arange(matrix.weight.shape[1]))
            modules.setdefault(matrix.module, []).append(pair)
    for pairs in modules.values():
        # What computes is the same for all: the first that has seen a token speaks for those that haven't.
        if next((seen for pair in pairs if (seen := _is_invisible(replay, pair)) is not None), False):
            yield from pairs
