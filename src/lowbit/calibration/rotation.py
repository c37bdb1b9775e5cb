"""Rotating a model's residual stream and its heads' values before quantization, merged into the weights.

With an orthogonal Q, a decoder computes the same on ``h Q`` as on ``h`` where every matrix that reads the stream h is
multiplied by Q on its input side and every matrix that writes to it on its output side, and where the norms between
commute with Q: RMSNorm without weights does, so the weights go into the matrices behind it. What was an outlier channel
is then spread over all channels (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406). A second rotation of each
head's values is merged into the projections before and behind attention. Nothing is left to do at run time.

LayerNorm also subtracts the mean, which commutes with those Q that keep the vector of ones; for models with LayerNorm
such a Q is taken. Which matrices read and write the stream is found by running a block; the result is checked by
comparing the block's output, for the same input rotated, with its output before, rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit.algorithms.hadamard import Rotation
from lowbit.calibration.matrices import Matrix, matrices, norms, own_bias
from lowbit.calibration.pairs import consumers, norm_offset, pairs_of, unseen_like
from lowbit.calibration.replay import Call, Replay, distance
from lowbit.errors import PlanError

# What rotating may change of a block's output, relative to what the block adds to its input.
_TOLERANCE: Final = 1e-4
_CENTRED: Final = 1e-3

Signature = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class StreamNorm:
    """A norm on the residual stream.

    Attributes:
        name: in the block.
        readers: the matrices behind it, into which its weight goes.
        offset: what it adds to its weight before it multiplies with it.
    """

    name: str
    readers: tuple[str, ...]
    offset: float


@dataclass(frozen=True)
class HeadValues:
    """Values of heads that can be rotated between two matrices.

    Attributes:
        source: the matrix that makes them.
        target: the matrix that reads them behind attention.
        rows: ``int64 [heads, size]``: the rows of the source that each head of the target's columns reads.
    """

    source: str
    target: str
    rows: Tensor


@dataclass(frozen=True)
class BlockKind:
    """How blocks with the same parameters are rotated."""

    norms: tuple[StreamNorm, ...]
    writers: tuple[str, ...]
    heads: tuple[HeadValues, ...] = ()


@dataclass
class RotationPlan:
    """What is rotated in a model, and how; blocks may come one by one.

    Attributes:
        rotation: of the residual stream.
        heads: of attention, whose values are rotated too; 0 where they stay as they are.
        head_seed: of their rotation.
        kinds: of blocks, by their parameters' names and shapes.
        norm_type: of the norms on the stream, the final one included.
        norm_offset: what they add to their weights.
        untie: whether embedding and head are tied and have to get weights of their own:
            ``config.tie_word_embeddings`` becomes False.
        notes: what somebody should know of it.
    """

    rotation: Rotation
    heads: int = 0
    head_seed: int = 1
    kinds: dict[Signature, BlockKind] = field(default_factory=dict)
    norm_type: type[nn.Module] = nn.Module
    norm_offset: float = 0.0
    untie: bool = False
    notes: list[str] = field(default_factory=list)

    def add_block(self, block: nn.Module, run: Callable[[], object]) -> None:
        """Plan for blocks like this one, which isn't rotated itself.

        Args:
            block: with its weights.
            run: calls it once on a small real input, see :func:`lowbit.calibration.pairs.find_pairs`.

        Raises:
            PlanError: the block can't be rotated; the message says why.
        """
        signature = _signature(block)
        if signature in self.kinds:
            return
        replay = Replay(block, run)
        _require_one_stream(replay)
        kind, offset = _find_kind(replay, self.rotation)
        values = _find_heads(replay, kind, self.heads, self.head_seed) if self.heads else ()
        kind = BlockKind(kind.norms, kind.writers, values)
        self._require_same_norms(type(replay.block.get_submodule(kind.norms[0].name)), offset)
        _rotate(replay.block, kind, self)
        _check(replay, self.rotation)
        self.kinds[signature] = kind

    def _require_same_norms(self, norm_type: type[nn.Module], offset: float) -> None:
        if not self.kinds:
            self.norm_type, self.norm_offset = norm_type, offset
        elif (self.norm_type, self.norm_offset) != (norm_type, offset):
            raise PlanError(f"blocks have different norms: {self.norm_type.__name__} and {norm_type.__name__}")

    @torch.no_grad()
    def rotate_block(self, block: nn.Module) -> None:
        """Rotate one of the model's blocks in place; every block must be rotated exactly once.

        Raises:
            PlanError: no block with such parameters was planned for (:meth:`add_block`), or a weight of a norm is 0
                where its bias can't go into the matrices behind it.
        """
        kind = self.kinds.get(_signature(block))
        if kind is None:
            raise PlanError(
                f"this {type(block).__name__} has other parameters than the block that was traced; "
                "call add_block() with it and with what runs it"
            )
        _rotate(block, kind, self)

    @torch.no_grad()
    def rotate_outside(self, embedding: nn.Module, final_norm: nn.Module, head: nn.Module) -> None:
        """Rotate what lies before and behind the blocks, in place; a tied head gets a weight of its own.

        Args:
            embedding: whose rows start the residual stream, ``weight [vocabulary, hidden]``.
            final_norm: the norm behind the last block.
            head: the linear layer that makes the logits.
        """
        shared = embedding.get_parameter("weight")
        if head.get_parameter("weight") is shared:
            head.register_parameter("weight", nn.Parameter(shared.detach().clone(), requires_grad=False))
        known = {"head": matrices(head)[""]}
        _fold_norm(final_norm, self.norm_offset, list(known.values()), self.rotation)
        _turn_inputs(known["head"].weight, self.rotation)
        shared.detach().copy_(self.rotation.apply(shared.detach()))


def find_rotation(
    model: nn.Module, block: nn.Module, run: Callable[[], object], *, seed: int = 0, rotate_heads: bool = True
) -> RotationPlan:
    """Plan the rotation of a decoder.

    Args:
        model: a causal language model of Transformers; its weights may be on the meta device.
        block: one of its blocks, with weights; of models whose blocks differ in their parameters, add the others by
            :meth:`RotationPlan.add_block`.
        run: calls the block once on a small real input.
        seed: of the random signs.
        rotate_heads: whether the values of each head are rotated as well.

    Raises:
        PlanError: something in the model doesn't commute with a rotation; the message says what.
    """
    embedding, head, final_norm, config = _outside(model, block)
    size = embedding.get_parameter("weight").shape[1]
    heads = int(getattr(config, "num_attention_heads", 0)) if rotate_heads else 0
    plan = RotationPlan(Rotation(size, seed, centred=_subtracts_means(block, run, size)), heads, seed + 1)
    plan.add_block(block, run)
    if type(final_norm) is not plan.norm_type:
        raise PlanError(
            f"the final norm is a {type(final_norm).__name__}, those in blocks are {plan.norm_type.__name__}"
        )
    tied = embedding.get_parameter("weight") is head.get_parameter("weight")
    if tied or getattr(config, "tie_word_embeddings", False):
        plan.untie = True
        plan.notes.append(
            "embedding and head were tied; rotated they differ: set tie_word_embeddings to False and save both"
        )
    if not plan.rotation.known:
        plan.notes.append(f"no Hadamard matrix is known for {size} channels; a random rotation took part of its place")
    return plan


def final_norm_name(model: nn.Module, block: nn.Module) -> str:
    """The name of the one norm of a model that lies outside its blocks, for :meth:`RotationPlan.rotate_outside`.

    Raises:
        PlanError: there isn't exactly one.
    """
    stack = _stack_name(model, block)
    found = [name for name in norms(model) if not name.startswith(f"{stack}.")]
    if len(found) != 1:
        raise PlanError(f"one norm is expected outside the blocks, behind the last; found {found}")
    return found[0]


# ------------------------------------------------------------------------------------------------ outside of the blocks


def _outside(model: nn.Module, block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module, Any]:
    """Embedding, head, final norm and the text part of the config; nothing else may have parameters."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError("encoder-decoder models have two residual streams that meet; only decoders are rotated")
    embedding, head = (_call(model, name) for name in ("get_input_embeddings", "get_output_embeddings"))
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Module):
        raise PlanError("the model says of no module that it is its embedding, or its head")
    norm_name = final_norm_name(model, block)
    final_norm, stack = model.get_submodule(norm_name), _stack_name(model, block)
    inside = {id(module) for module in (embedding, head, final_norm)}
    others = [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
        if id(module) not in inside and not name.startswith(f"{stack}.")
    ]
    if others:
        raise PlanError(
            f"outside of its blocks the model has more than an embedding, a norm and a head: {', '.join(others[:5])}; "
            "whether a rotation commutes with it isn't known"
        )
    widths = {embedding.weight.shape[1], final_norm.get_parameter("weight").numel(), matrices(head)[""].weight.shape[1]}
    if len(widths) != 1:
        raise PlanError(f"embedding, final norm and head differ in their number of channels: {sorted(widths)}")
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return embedding, head, final_norm, text_config


def _call(model: nn.Module, name: str) -> object:
    method = getattr(model, name, None)
    return method() if callable(method) else None


def _stack_name(model: nn.Module, block: nn.Module) -> str:
    """The list of modules that holds modules of the block's type."""
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(type(child) is type(block) for child in module)
    ]
    if len(stacks) != 1:
        raise PlanError(f"one list of {type(block).__name__} is expected in the model; found {stacks}")
    return stacks[0]


# -------------------------------------------------------------------------------------------------------- in one block


def _subtracts_means(block: nn.Module, run: Callable[[], object], size: int) -> bool:
    """Whether a norm in the block does."""
    replay = Replay(block, run)
    if replay.hidden.shape[-1] != size:
        raise PlanError(f"blocks take {replay.hidden.shape[-1]} channels, and embeddings have {size}")
    calls = replay.record()
    return any(_is_centred(norm, calls[name]) for name, norm in norms(replay.block).items() if name in calls)


def _require_one_stream(replay: Replay) -> None:
    """A second input of the stream's shape might be rotated in the model, and isn't where the plan is tried."""
    others = [tensor for tensor in replay.floating_inputs() if tensor is not replay.hidden]
    if any(tensor.shape == replay.hidden.shape for tensor in others):
        raise PlanError(
            f"{type(replay.block).__name__} takes two inputs of {list(replay.hidden.shape)}; "
            "whether the second belongs to the residual stream isn't known"
        )


def _find_kind(replay: Replay, rotation: Rotation) -> tuple[BlockKind, float]:
    """Norms on the stream with their readers, and writers; and the offset that all those norms have."""
    calls, known = replay.record(), matrices(replay.block)
    found, without = [], []
    for name, norm in norms(replay.block).items():
        if name not in calls or norm.get_parameter("weight").numel() != rotation.size:
            continue
        readers = consumers(calls[name].output, calls, known)
        readers += unseen_like(readers, calls, known)
        offset = norm_offset(norm, calls[name])
        if not readers:
            without.append(name)
        elif offset is None:
            raise PlanError(f"'{name}' does more with its weight than to multiply by it")
        else:
            found.append(StreamNorm(name, tuple(readers), offset))
    _require_prenorm(found, without, calls, known)
    reading = {reader for norm in found for reader in norm.readers}
    writers = tuple(
        name for name, matrix in known.items() if matrix.weight.shape[0] == rotation.size and name not in reading
    )
    offsets = {norm.offset for norm in found}
    if len(offsets) != 1:
        raise PlanError(f"norms of one block differ in what they add to their weights: {sorted(offsets)}")
    if any(_is_centred(replay.block.get_submodule(norm.name), calls[norm.name]) for norm in found) > rotation.centred:
        raise PlanError("a norm subtracts the mean, and the rotation that was chosen for the others doesn't keep it")
    return BlockKind(tuple(found), writers), offsets.pop()


def _require_prenorm(
    found: list[StreamNorm], without: list[str], calls: Mapping[str, Call], known: Mapping[str, Matrix]
) -> None:
    reading = {reader for norm in found for reader in norm.readers}
    behind = [name for name in without if _follows_a_writer(calls[name].inputs, reading, calls, known)]
    if behind:
        raise PlanError(
            f"{', '.join(behind)}: a norm with weights between a layer and the residual stream; its weights can't be "
            "folded into anything, and a rotation doesn't commute with them"
        )
    if not found:
        raise PlanError("no norm with weights was found in the block whose output is read by matrices")


def _follows_a_writer(taken: Tensor, reading: set[str], calls: Mapping[str, Call], known: Mapping[str, Matrix]) -> bool:
    """Whether this is what a matrix gives that doesn't read a norm on the stream."""
    given = [
        calls[matrix.module].output for name, matrix in known.items() if name not in reading and matrix.module in calls
    ]
    return any(torch.equal(output.reshape(-1), taken.reshape(-1)) for output in given)


def _is_centred(norm: nn.Module, call: Call) -> bool:
    """Whether a norm subtracts the mean: adding a number to all channels then changes nothing."""
    with torch.no_grad():
        shifted = norm(call.inputs + call.inputs.std() * 2)
        spread = call.output.std()
    return shifted.shape == call.output.shape and bool((shifted - call.output).std() < _CENTRED * spread)


def _find_heads(replay: Replay, kind: BlockKind, heads: int, seed: int) -> tuple[HeadValues, ...]:
    """The pairs of value and output projections; each is tried, as other pairs don't let one mix their channels."""
    found = []
    for pair in pairs_of(replay):
        columns = len(pair.rows)
        whole = pair.kind == "linear" and columns % heads == 0 and bool((pair.rows >= 0).all())
        if not whole or len(pair.targets) != 1 or pair.targets[0] not in kind.writers:
            continue
        rows = pair.rows.view(heads, -1)
        values = HeadValues(pair.source, pair.targets[0], rows)
        consecutive = torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1]))
        if consecutive and _is_invisible(replay, values, Rotation(rows.shape[1], seed)):
            found.append(values)
    return tuple(found)


@torch.no_grad()
def _is_invisible(replay: Replay, values: HeadValues, turn: Rotation) -> bool:
    """Whether rotating values of heads leaves the outputs of the copy, which is the same afterwards."""
    known = matrices(replay.block)
    touched = [known[values.source].weight, known[values.target].weight]
    bias = known[values.source].bias
    touched += [] if bias is None else [bias]
    kept = [tensor.clone() for tensor in touched]
    _turn_heads_in(known, values, turn)
    one_side = distance(replay.outputs(), replay.base)
    _turn_heads_out(known, values, turn)
    both = distance(replay.outputs(), replay.base)
    for tensor, before in zip(touched, kept, strict=True):
        tensor.copy_(before)
    return one_side > 0 and both <= _TOLERANCE * one_side


def _signature(block: nn.Module) -> Signature:
    return tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


@torch.no_grad()
def _rotate(block: nn.Module, kind: BlockKind, plan: RotationPlan) -> None:
    known = matrices(block)
    for norm in kind.norms:
        readers = [known[name] for name in norm.readers]
        _fold_norm(block.get_submodule(norm.name), norm.offset, readers, plan.rotation)
        for reader in readers:
            _turn_inputs(reader.weight, plan.rotation)
    for name in kind.writers:
        _turn_outputs(known[name], plan.rotation)
    for values in kind.heads:
        turn = Rotation(values.rows.shape[1], plan.head_seed)
        _turn_heads_in(known, values, turn)
        _turn_heads_out(known, values, turn)


def _fold_norm(norm: nn.Module, offset: float, readers: list[Matrix], rotation: Rotation) -> None:
    """Leave a norm a weight of one, and move its own into what reads it.

    Its bias goes into the readers' biases; where one has none, it stays with the norm as ``(b / g) Q``, which the
    readers, multiplied by g and Q, undo.
    """
    weight, bias = norm.get_parameter("weight").detach(), own_bias(norm)
    factors = weight.float() + offset
    if bias is not None and all(reader.bias is not None for reader in readers):
        for reader in readers:
            if reader.bias is not None:
                reader.bias.copy_(reader.bias.float() + reader.weight.float() @ bias.float().to(reader.weight.device))
        bias.zero_()
    elif bias is not None and bool(bias.any()):
        if bool((factors.abs() < 1e-4 * factors.abs().max()).any()):
            raise PlanError(
                "a norm has a bias, weights of 0, and behind it a matrix without bias that could take it up"
            )
        bias.copy_(rotation.apply(bias.float() / factors))
    for reader in readers:
        reader.weight.copy_(reader.weight.float() * factors.to(reader.weight.device))
    weight.fill_(1 - offset)


def _turn_inputs(weight: Tensor, rotation: Rotation) -> None:
    weight.copy_(rotation.apply(weight))


def _turn_outputs(matrix: Matrix, rotation: Rotation) -> None:
    matrix.weight.copy_(rotation.apply(matrix.weight, axis=0))
    if matrix.bias is not None:
        matrix.bias.copy_(rotation.apply(matrix.bias))


def _turn_heads_in(known: Mapping[str, Matrix], values: HeadValues, turn: Rotation) -> None:
    source = known[values.source]
    for rows in values.rows.unique(dim=0).to(source.weight.device):
        source.weight[rows] = turn.apply(source.weight[rows], axis=0).to(source.weight.dtype)
        if source.bias is not None:
            source.bias[rows] = turn.apply(source.bias[rows]).to(source.bias.dtype)


def _turn_heads_out(known: Mapping[str, Matrix], values: HeadValues, turn: Rotation) -> None:
    weight = known[values.target].weight
    turned = turn.apply(weight.unflatten(1, tuple(values.rows.shape)))
    weight.copy_(turned.flatten(1))


def _check(replay: Replay, rotation: Rotation) -> None:
    """Whether the rotated copy gives, for the rotated input, what it gave before, rotated."""
    given = replay.outputs(rotation.apply(replay.hidden))
    wanted = [rotation.apply(replay.base[0]), *replay.base[1:]]
    added = distance(replay.base[:1], [replay.hidden]) or 1.0
    off = distance(given, wanted) / added
    if not off <= _TOLERANCE:
        raise PlanError(
            f"{type(replay.block).__name__} doesn't commute with a rotation: its output is {off:.2g} of what it adds "
            "to the residual stream away from what it should be; something in it reads or writes the stream otherwise "
            "than through the norms and matrices that were found"
        )
