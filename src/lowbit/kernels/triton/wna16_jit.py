"""The Triton programs of the ``triton-wna16`` family; importing this module needs triton.

The layout that they read is pictured in ``docs/kernels/wna16.md``. Each warp of the fused program owns some rows and a
slice of the input axis; the slices are added up in the end, within the program, so that programs share nothing and the
order of every sum is fixed.

The shapes of all tensors below are chosen such that the layouts that the compiler picks for coalesced loads *are* the
operand layouts of the matrix instruction: a word goes from memory to the tensor core without a detour through shared
memory. Should another version of the compiler pick otherwise, the result is the same and only slower.

Axes: ``t`` (4) thread of a quad, ``r`` (8) quad, ``h`` (2) upper or lower 8 of 16 rows, ``i`` (4) word of a thread,
``s`` warp, ``f`` block of 16 rows of a warp, ``m`` row of the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.cuda is not None)

# A code OR 0x6400 is 1024 + code in fp16, sixteen codes OR 0x6400 is 1024 + 16 * code: two weights per instruction.
_FP16 = """{{
    .reg .b32 words, sixteenth;
    mov.b32 sixteenth, 0x2c002c00;
    shr.u32 words, $2, {shift};
    lop3.b32 $0, words, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $1, words, 0x00f000f0, 0x64006400, 0xea;
    sub.f16x2 $0, $0, $3;
    fma.rn.f16x2 $1, $1, sixteenth, $4;
}}"""
# A code OR 0x4300 is 128 + code in bf16, whose seven bits have no room for the second.
_BF16 = """{{
    .reg .b32 words, upper, one;
    mov.b32 one, 0x3f803f80;
    shr.u32 words, $2, {shift};
    shr.u32 upper, $2, {shift} + 4;
    lop3.b32 $0, words, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, upper, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, $0, one, $3;
    fma.rn.bf16x2 $1, $1, one, $3;
}}"""
_FP16_LOW, _FP16_HIGH = tl.constexpr(_FP16.format(shift=0)), tl.constexpr(_FP16.format(shift=8))
_BF16_LOW, _BF16_HIGH = tl.constexpr(_BF16.format(shift=0)), tl.constexpr(_BF16.format(shift=8))


@triton.jit
def _centred(words, zeros, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """The codes 2 * HIGH and 2 * HIGH + 1 of each word, less the zero point, exactly: two tensors of DTYPE."""
    if PTX and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            _FP16_HIGH if HIGH else _FP16_LOW,
            constraints="=r,=r,r,r,r",
            args=[words, (zeros | 0x6400).to(tl.int16), ((zeros << 4) | 0xD400).to(tl.int16)],  # 1024 + z, -(64 + z)
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif PTX and tl.bfloat16 == DTYPE:  # noqa: RET505 (Triton compiles only the taken branch of an if-elif)
        return tl.inline_asm_elementwise(
            _BF16_HIGH if HIGH else _BF16_LOW,
            constraints="=r,=r,r,r",
            args=[words, (zeros | 0xC300).to(tl.int16)],  # -(128 + z)
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        wide = words.to(tl.int32) >> (8 * HIGH)
        return ((wide & 15) - zeros).to(DTYPE), (((wide >> 4) & 15) - zeros).to(DTYPE)


@triton.jit
def _tile(turn, step, WARPS: tl.constexpr, SLICES: tl.constexpr, STEPS: tl.constexpr):
    """The tile that each warp reads in this step: two neighbours in a row, which are 128 columns."""
    return ((turn * (STEPS // 2) + step // 2) * SLICES + tl.arange(0, WARPS) % SLICES) * 2 + step % 2


@triton.jit
def _words(codes, turn, tiles, WARPS: tl.constexpr, SLICES: tl.constexpr, FRAGMENTS: tl.constexpr, STEPS: tl.constexpr,
           EVEN: tl.constexpr):  # fmt: skip
    """The words of a whole turn: STEPS tensors [s, 16 * f, 16]."""
    words = ()
    for step in tl.static_range(STEPS):
        tile = _tile(turn, step, WARPS, SLICES, STEPS)
        if EVEN:
            loaded = tl.load(codes + (tile * 256)[:, None, None])
        else:
            loaded = tl.load(codes + (tile * 256)[:, None, None], mask=(tile < tiles)[:, None, None], other=0)
        loaded = tl.permute(tl.reshape(loaded, (WARPS, FRAGMENTS, 8, 4, 2, 4)), (0, 1, 4, 2, 3, 5))
        words += (tl.reshape(loaded, (WARPS, 16 * FRAGMENTS, 16)),)
    return words


@triton.jit
def _group_index(column, blocks, groups, GROUP: tl.constexpr, FINE: tl.constexpr, EVEN: tl.constexpr,
                 WARPS: tl.constexpr, FRAGMENTS: tl.constexpr):  # fmt: skip
    """Where the groups of the 32 columns from `column` [s] on are stored, for each row and thread: [t, r, s, f, h].

    Threads of a quad differ only where groups are FINE; else the axis t gives the load the layout of its use.
    """
    quad, half, thread = tl.arange(0, 8), tl.arange(0, 2), tl.arange(0, 4)
    if GROUP == 0:
        group = tl.zeros((4, WARPS), tl.int32)
    else:
        group = (column[None, :] + (thread * (8 if FINE else 0))[:, None]) // GROUP
    if not EVEN:
        group = tl.minimum(group, groups - 1)
    index = ((blocks * groups)[None, None, :, :] + group[:, None, :, None]) * 16 + quad[None, :, None, None] * 2
    return tl.broadcast_to(index[:, :, :, :, None] + half[None, None, None, None, :], (4, 8, WARPS, FRAGMENTS, 2))


@triton.jit
def _per_group(pointers, WARPS: tl.constexpr, FRAGMENTS: tl.constexpr):
    """What is stored there, as [s, 16 * f, t]."""
    return tl.reshape(tl.permute(tl.load(pointers), (2, 3, 4, 1, 0)), (WARPS, 16 * FRAGMENTS, 4))


@triton.jit
def _per_word(values):
    """[s, n, t] to [s, n, 16]: the same for the four words of a thread."""
    warps: tl.constexpr = values.shape[0]
    rows: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, :, None], (warps, rows, 4, 4)), (warps, rows, 16))


@triton.jit
def _operands(inputs, start, rows, in_features, ROWS: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr):
    """32 columns of the inputs from `start` [s] on, two operands [s, 16, m]; a thread has 8 neighbours, 4 in each."""
    row = tl.arange(0, ROWS // 8)[None, :] * 8 + tl.arange(0, 8)[:, None]
    column = start[:, None] + tl.arange(0, 32)[None, :]
    mask = (row < rows)[:, None, :, None]
    if not EVEN:
        mask = mask & (column < in_features)[None, :, None, :]
    source = inputs + (row * in_features)[:, None, :, None] + column[None, :, None, :]
    values = tl.permute(tl.load(source, mask=mask, other=0.0), (1, 2, 0, 3))
    values = tl.permute(tl.reshape(values, (WARPS, ROWS // 8, 8, 4, 2, 4)), (0, 1, 2, 3, 5, 4))
    first, second = tl.split(values)  # [s, m // 8, m % 8, t, i]
    first, second = tl.reshape(first, (WARPS, ROWS, 16)), tl.reshape(second, (WARPS, ROWS, 16))
    return tl.permute(first, (0, 2, 1)), tl.permute(second, (0, 2, 1))


@triton.jit(do_not_specialize=["rows"])
def fused_linear(inputs_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, outputs_ptr,
                 rows, out_features, in_features, tiles, groups,
                 GROUP: tl.constexpr, PAIRS: tl.constexpr, BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
                 EVEN: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr,
                 SLICES: tl.constexpr, BANDS: tl.constexpr, FRAGMENTS: tl.constexpr, STEPS: tl.constexpr,
                 PREFETCH: tl.constexpr):  # fmt: skip
    """``outputs [rows, out] = inputs @ W.T + bias``, ROWS rows at a time.

    GROUP is 0 for one group per row. PAIRS: how many runs of 32 columns share a scale, 4, 2 or 1; 0 where groups are
    multiples of 8 only, and the weights are scaled instead of the sums. DEPENDENT: launched while the kernel before may
    still run. The rest is :class:`lowbit.kernels.triton.wna16.Config`.
    """
    WARPS: tl.constexpr = BANDS * SLICES
    # The interpreter multiplies bf16 wrongly.
    dtype: tl.constexpr = tl.float32 if INTERPRETED else inputs_ptr.dtype.element_ty
    if DEPENDENT:
        gdc_wait()  # before anything is read: the weight, too, may just have been written
        gdc_launch_dependents()
    first_row = tl.program_id(1) * ROWS
    inputs, left = inputs_ptr + first_row * in_features, rows - first_row
    band = tl.program_id(0) * BANDS + tl.arange(0, WARPS) // SLICES
    blocks = tl.minimum(band[:, None] * FRAGMENTS + tl.arange(0, FRAGMENTS)[None, :], (out_features - 1) // 16)
    codes = codes_ptr + (blocks.to(tl.int64) * tiles * 256)[:, :, None] + tl.arange(0, 256)[None, None, :]
    total = tl.zeros((WARPS, 16 * FRAGMENTS, ROWS), tl.float32)
    if PREFETCH:
        coming = _words(codes, 0, tiles, WARPS, SLICES, FRAGMENTS, STEPS, EVEN)
    for turn in tl.range(TURNS):
        # All loads of a turn come before its products, so that many are under way at a time.
        if PREFETCH:
            words = coming
            coming = _words(codes, turn + 1, tiles, WARPS, SLICES, FRAGMENTS, STEPS, False)
        else:
            words = _words(codes, turn, tiles, WARPS, SLICES, FRAGMENTS, STEPS, EVEN)
        scales, zeros, operands = (), (), ()
        for step in tl.static_range(STEPS):
            column = _tile(turn, step, WARPS, SLICES, STEPS) * 64
            for pair in tl.static_range(2):
                if PAIRS == 0 or (2 * step + pair) % (PAIRS or 1) == 0:
                    index = _group_index(column + 32 * pair, blocks, groups, GROUP, PAIRS == 0, EVEN, WARPS, FRAGMENTS)
                    scales += (_per_group(scales_ptr + index, WARPS, FRAGMENTS),)
                    zeros += (_per_group(zeros_ptr + index, WARPS, FRAGMENTS),)
        for step in tl.static_range(STEPS):
            column = _tile(turn, step, WARPS, SLICES, STEPS) * 64
            operands += _operands(inputs, column, left, in_features, ROWS, WARPS, EVEN)
            operands += _operands(inputs, column + 32, left, in_features, ROWS, WARPS, EVEN)
        for step in tl.static_range(STEPS):
            for pair in tl.static_range(2):
                if PAIRS == 0 or (2 * step + pair) % (PAIRS or 1) == 0:
                    scale = scales[(2 * step + pair) // (PAIRS or 1)].to(tl.float32)
                    zero = _per_word(zeros[(2 * step + pair) // (PAIRS or 1)].to(tl.int32))
                    sums = tl.zeros((WARPS, 16 * FRAGMENTS, ROWS), tl.float32)
                first, second = _centred(words[step], zero, pair, dtype)
                if PAIRS == 0:
                    first = (first.to(tl.float32) * _per_word(scale)).to(dtype)
                    second = (second.to(tl.float32) * _per_word(scale)).to(dtype)
                sums = tl.dot(first, operands[4 * step + 2 * pair].to(dtype), sums)
                sums = tl.dot(second, operands[4 * step + 2 * pair + 1].to(dtype), sums)
                if PAIRS == 0:
                    total += sums
                elif (2 * step + pair + 1) % PAIRS == 0:
                    wide = tl.broadcast_to(scale[:, :, None, :, None], (WARPS, 16 * FRAGMENTS, ROWS // 8, 4, 2))
                    total += sums * tl.reshape(wide, (WARPS, 16 * FRAGMENTS, ROWS))
    result = tl.sum(tl.reshape(total, (BANDS, SLICES, 16 * FRAGMENTS, ROWS)), axis=1)
    result = tl.reshape(result, (BANDS * 16 * FRAGMENTS, ROWS))
    output = tl.program_id(0) * (BANDS * 16 * FRAGMENTS) + tl.arange(0, BANDS * 16 * FRAGMENTS)
    if BIAS:
        bias = tl.load(bias_ptr + output, mask=output < out_features, other=0.0)
        result += bias.to(tl.float32)[:, None]
    row = first_row + tl.arange(0, ROWS)
    target = outputs_ptr + row[None, :] * out_features + output[:, None]
    mask = (row < rows)[None, :] & (output < out_features)[:, None]
    tl.store(target, result.to(outputs_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather(inputs_ptr, columns_ptr, outputs_ptr, in_features, DEPENDENT: tl.constexpr, SIZE: tl.constexpr):
    """``outputs [rows, in] = inputs[:, columns]``, SIZE columns of one row per program."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    source = tl.load(columns_ptr + column, mask=column < in_features, other=0)
    row = tl.program_id(0).to(tl.int64) * in_features
    tl.store(outputs_ptr + row + column, tl.load(inputs_ptr + row + source), mask=column < in_features)


@triton.jit
def dequantize(codes_ptr, scales_ptr, zeros_ptr, dense_ptr, out_features, in_features, tiles, groups,
               GROUP: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """16 rows of TILES * 64 columns of the dense weight, rounded once from fp32."""
    block, tile = tl.program_id(0), tl.program_id(1) * TILES + tl.arange(0, TILES)
    words = codes_ptr + block.to(tl.int64) * tiles * 256 + (tile * 256)[:, None] + tl.arange(0, 256)[None, :]
    words = tl.load(words, mask=(tile < tiles)[:, None], other=0).to(tl.int32)
    words = tl.permute(tl.reshape(words, (TILES, 8, 4, 2, 4)), (2, 1, 0, 3, 4))  # t, r, tile, h, i
    codes = (words[:, :, :, :, :, None] >> (4 * tl.arange(0, 4))[None, None, None, None, None, :]) & 15
    codes = tl.permute(tl.reshape(codes, (4, 8, TILES, 2, 4, 2, 2)), (0, 1, 2, 3, 5, 6, 4))
    codes = tl.reshape(codes, (4, 8, TILES, 2, 2, 8))  # t, r, tile, h, pair, eight neighbours
    thread, quad, half, pair = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 2), tl.arange(0, 2)
    column = (thread * 8)[:, None, None] + (tile * 64)[None, :, None] + (pair * 32)[None, None, :]
    group = tl.minimum(column // GROUP, groups - 1) if GROUP else column * 0
    index = ((block * groups + group) * 16)[:, None, :, :, None] + (quad * 2)[None, :, None, None, None]
    index += half[None, None, None, None, :]
    scale = tl.permute(tl.load(scales_ptr + index), (0, 1, 2, 4, 3)).to(tl.float32)
    zero = tl.permute(tl.load(zeros_ptr + index), (0, 1, 2, 4, 3)).to(tl.int32)
    values = (codes - zero[:, :, :, :, :, None]).to(tl.float32) * scale[:, :, :, :, :, None]
    row = block * 16 + (half * 8)[None, :] + quad[:, None]
    column = column[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
    target = dense_ptr + row.to(tl.int64)[None, :, None, :, None, None] * in_features + column[:, None, :, None, :, :]
    mask = (row < out_features)[None, :, None, :, None, None] & (column < in_features)[:, None, :, None, :, :]
    tl.store(target, values.to(dense_ptr.dtype.element_ty), mask=mask)
