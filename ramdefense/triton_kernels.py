"""Kernels of refined attention on a GPU, in Triton: the N×N matrix is made tile by tile and never written.

Let S be the scores times log₂e. The forward kernel brings each row to four numbers (r, w, c, T) with which every weight
before RAD follows from its score alone,

    P = T where S > c, else min(w · 2^(S − r), T),

and sums P∘K·V in a last pass over the keys (K is RAD's factor, 0 or 1 / (1 − p), from `counter`):

- ``clamp``: one pass before it, for the row's maximum r and w = 1 / Σ2^(S − r).
- ``scale``: the same, w = min(1 / Σ2^(S − r), T).
- ``cap``: Newton's steps for the level c with #{S > c} + Σ_{S ≤ c} 2^(S − c) = 1/T, from c = ∞, where a step gives
  the log-sum-exp. A step is a pass; it needs the number above c and the log-sum-exp of the others, so that scores far
  apart, as an attack makes them, lose nothing. Newton stays above the root; a row that it brings forward by a few
  elements a step only is searched by doubled steps down, then by halving. No element between the new level and the old
  ends the search.

The gradient of the scores is X∘G − W·(Σ X∘G) / (Σ W) for each row, G = K∘(dO Vᵀ), the last sum 1 where it says so:

- ``clamp``: X = A where A ≤ T, else 0, and W = A, without its sum (it is 1).
- ``cap``: X = W = P where P < T, else 0.
- ``scale``: X = P; where the row exceeds T, W is 1 at its maximum (ties share), else W = A, without its sum.
- straight through: X = W = A.

Σ X∘G is found by the kernel of dQ, which carries both sums over the keys and subtracts at its end, and handed to that
of dK and dV. So that no digits go, the products of half precision are of X∘G − W·(dO·O), which is almost all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

CLAMP = tl.constexpr(0)
CAP = tl.constexpr(1)
SCALE = tl.constexpr(2)
FREE = tl.constexpr(3)  # no bound: T = 1

BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)

ELEMENTS = tl.constexpr(1)
KEYS = tl.constexpr(2)

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # a finite score stays one, also times log₂e
HUGE = tl.constexpr(3.0e38)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(1.2e-38)
TIGHT = tl.constexpr(1 + 1e-6)  # as refinement._ROUNDING
STEADY = tl.constexpr(2.0**-14)  # a level that moves by less, in octaves, is the level
NEAR = tl.constexpr(2.0**-16)  # so close to the maximum, in octaves for each octave of it, is the maximum
NEWTON = tl.constexpr(8)  # rounds before the level is searched by halving as well
ROUNDS = tl.constexpr(96)


# ------------------------------------------------------------------------------------------------- RAD (see `counter`)


@triton.jit
def row_words(seed, rows):
    """a and b of some rows (int64) of the stream of a seed (int64), as uint32."""
    z = seed.to(tl.uint64, bitcast=True) + (rows + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32) | 1, (z >> 32).to(tl.uint32)


@triton.jit
def column_words(columns):
    y = columns.to(tl.uint32) * 0x9E3779B1
    y = (y ^ (y >> 15)) * 0x85EBCA77
    return y ^ (y >> 14)


@triton.jit
def kept(a, b, columns, dropped):
    """Whether the elements are kept; ``dropped`` is the probability in units of 2⁻¹⁶."""
    return column_words(columns) * a + b >= tl.cast(dropped, tl.uint32) << 16


# ------------------------------------------------------------------------------------------------------- the scores


@triton.jit
def load_rows(pointer, rows, columns, stride, stride_column, count, WIDTH: tl.constexpr):
    """A tile (rows, columns) of a matrix with ``count`` rows and WIDTH columns, 0 outside."""
    inside = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :] * stride_column, mask=inside, other=0.0)


@triton.jit
def masked_scores(
    s, rows, columns, mask, stride_row, stride_key, queries, keys, MASK: tl.constexpr, CAUSAL: tl.constexpr
):
    """Scores of a tile, −inf where a key is masked or does not exist; ``rows``, ``columns`` broadcast to the tile."""
    if MASK != 0:
        inside = (rows < queries) & (columns < keys)
        offset = rows.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_key
        if MASK == BOOL_MASK:
            s = tl.where(tl.load(mask + offset, mask=inside, other=0) != 0, s, -INF)
        else:
            added = tl.load(mask + offset, mask=inside, other=0.0).to(tl.float32)
            s = tl.where(added == -INF, -INF, s + tl.maximum(added * LOG2E, LOWEST))
    if CAUSAL:
        s = tl.where(rows >= columns, s, -INF)
    return tl.where(columns < keys, s, -INF)


@triton.jit
def threshold(value, counted, MULTIPLE: tl.constexpr):
    """T of each row, from the number of its keys."""
    if MULTIPLE:
        return tl.minimum(value / tl.maximum(counted, 1.0), 1.0)
    else:
        return value + counted * 0.0


@triton.jit
def weights(s, r, w, c, t, BOUND: tl.constexpr):
    """The weights before RAD, and what they would be without the bound."""
    e = tl.exp2(s - r) * w
    if BOUND == CAP:
        return tl.where(s > c, t, tl.minimum(e, t)), e
    elif BOUND == CLAMP:
        return tl.minimum(e, t), e
    else:
        return e, e


# ------------------------------------------------------------------------------------------------------- forwards


@triton.jit
def below(
    q,
    k_base,
    mask_base,
    level,
    rows,
    stride_kn,
    stride_ke,
    stride_mm,
    stride_mn,
    queries,
    keys,
    end,
    scale,
    E: tl.constexpr,
    E2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of each row's scores up to ``level``: the maximum, Σ2^(S − maximum), and how many lie above; then how many exist.

    One pass over the keys. The maximum is −inf and the sum 0 where there is none.
    """
    top = tl.full((BLOCK_M,), -INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    above = tl.zeros((BLOCK_M,), tl.float32)
    existing = tl.zeros((BLOCK_M,), tl.float32)
    features = tl.arange(0, E2)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, columns, features, stride_kn, stride_ke, keys, E)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = masked_scores(
            s, rows[:, None], columns[None, :], mask_base, stride_mm, stride_mn, queries, keys, MASK, CAUSAL
        )
        if MASK != 0:
            existing += tl.sum((s > -INF).to(tl.float32), 1)
        over = s > level[:, None]
        above += tl.sum(over.to(tl.float32), 1)
        s = tl.where(over, -INF, s)
        higher = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(higher == -INF, 0.0, higher)
        total = total * tl.exp2(top - reference) + tl.sum(tl.exp2(s - reference[:, None]), 1)
        top = higher
    if MASK == 0:
        existing += tl.minimum(rows + 1, keys) if CAUSAL else keys
    return top, total, above, existing


@triton.jit
def forward(
    Q,
    K,
    V,
    MASK_,
    SEEDS,
    OUT,
    STATS,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qe,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_ke,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ve,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    heads,
    queries,
    keys,
    per_stream,  # batch entries of one stream
    size,  # of one of the arrays in STATS: batch · heads · queries
    scale,  # of the scores, times log₂e
    dropped,
    factor,  # of what RAD keeps
    value,  # T, or x of x/N
    E: tl.constexpr,
    EV: tl.constexpr,
    E2: tl.constexpr,
    EV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND: tl.constexpr,
    MULTIPLE: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAD: tl.constexpr,
    PLAIN: tl.constexpr,  # whether r and w of the softmax without a bound are kept, for straight through
    PRECISION: tl.constexpr,
):
    """OUT (batch, heads, queries, EV), contiguous, and r, w, c, T of each row in STATS (K, batch, heads, queries)."""
    blocks = tl.cdiv(queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    features, values = tl.arange(0, E2), tl.arange(0, EV2)
    k_base = K + b * stride_kb + h * stride_kh
    v_base = V + b * stride_vb + h * stride_vh
    mask_base = MASK_ + b * stride_mb + h * stride_mh
    q = load_rows(Q + b * stride_qb + h * stride_qh, rows, features, stride_qm, stride_qe, queries, E)
    end = tl.minimum(keys, (block + 1) * BLOCK_M) if CAUSAL else keys

    c = tl.full((BLOCK_M,), INF, tl.float32)
    r, w, t = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), HUGE, tl.float32)
    if BOUND != FREE:
        top, total, above, counted = below(
            q, k_base, mask_base, c, rows, stride_kn, stride_ke, stride_mm, stride_mn, queries, keys, end, scale,
            E, E2, BLOCK_M, BLOCK_N, MASK, CAUSAL, PRECISION,
        )  # fmt: skip
        nothing = top == -INF
        r = tl.where(nothing, 0.0, top)
        softmax = tl.where(nothing, 0.0, 1.0 / tl.maximum(total, TINY))
        t = threshold(value, counted, MULTIPLE)
        w = softmax
        stats = STATS + plane.to(tl.int64) * queries + rows
        if PLAIN:
            tl.store(stats + 4 * size, r, mask=rows < queries)
            tl.store(stats + 5 * size, softmax, mask=rows < queries)
        if BOUND == SCALE:
            over = softmax > t
            w = tl.minimum(softmax, t)
            c = tl.where(over, top - NEAR * (1.0 + tl.abs(top)), INF)
            t = tl.full((BLOCK_M,), HUGE, tl.float32)
        if BOUND == CAP:
            tight = (counted * t <= TIGHT) & (counted > 0)
            high = r + tl.log2(tl.maximum(total, TINY)) + tl.log2(t)
            low = tl.full((BLOCK_M,), -INF, tl.float32)
            step = tl.full((BLOCK_M,), 1.0, tl.float32)
            done = nothing | tight | (top <= high) | (rows >= queries)
            level = high
            turn = 1
            while tl.max((~done).to(tl.int32), 0) > 0:
                top, total, above, counted = below(
                    q, k_base, mask_base, level, rows, stride_kn, stride_ke, stride_mm, stride_mn, queries, keys, end,
                    scale, E, E2, BLOCK_M, BLOCK_N, MASK, CAUSAL, PRECISION,
                )  # fmt: skip
                left = 1.0 - above * t
                spent = left <= 0.0
                none = top == -INF  # all keys lie above
                left = tl.maximum(left, 0.0)
                top0 = tl.where(none, 0.0, top)
                newton = top0 + tl.log2(tl.maximum(total, TINY)) + tl.log2(t) - tl.log2(tl.maximum(left, TINY))
                newton = tl.where(spent | none, INF, newton)
                trusted = level >= high
                valid = trusted | (~spent & (newton <= level))
                settled = valid & ((top <= newton) | (level - newton <= STEADY))
                settled = (settled | (turn >= ROUNDS)) & ~done
                r = tl.where(settled, top0, r)
                w = tl.where(settled, tl.where(none, 0.0, left / tl.maximum(total, TINY)), w)
                c = tl.where(settled, level, c)
                done = done | settled
                high = tl.minimum(high, newton)
                low = tl.where(valid, low, tl.maximum(low, level))
                turn += 1
                # by turns Newton's level and one further down, which may prove too far
                probe = tl.where(low > -INF, 0.5 * low + 0.5 * high, high - step)
                probing = (turn > NEWTON) & (turn % 2 == 0) & (turn < ROUNDS)
                step = tl.where(probing, 2.0 * step, step)
                level = tl.where(probing & (probe < high), probe, high)
            c = tl.where(tight, -INF, c)
            t = tl.where(tight, 1.0 / tl.maximum(counted, 1.0), t)
        tl.store(stats, r, mask=rows < queries)
        tl.store(stats + size, w, mask=rows < queries)
        tl.store(stats + 2 * size, c, mask=rows < queries)
        tl.store(stats + 3 * size, t, mask=rows < queries)

    if RAD != 0:
        seed = tl.load(SEEDS + b // per_stream)
        matrix = (b % per_stream) * heads + h
        if RAD == ELEMENTS:
            a_word, b_word = row_words(seed, matrix * queries + rows)
        else:
            a_word, b_word = row_words(seed, matrix)
    sums = tl.zeros((BLOCK_M, EV2), tl.float32)
    top = tl.full((BLOCK_M,), -INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, columns, features, stride_kn, stride_ke, keys, E)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = masked_scores(
            s, rows[:, None], columns[None, :], mask_base, stride_mm, stride_mn, queries, keys, MASK, CAUSAL
        )
        if BOUND == FREE:  # the log-sum-exp is found on the way
            higher = tl.maximum(top, tl.max(s, 1))
            reference = tl.where(higher == -INF, 0.0, higher)
            p = tl.exp2(s - reference[:, None])
            shrunk = tl.exp2(top - reference)
            total = total * shrunk + tl.sum(p, 1)
            sums = sums * shrunk[:, None]
            top = higher
        else:
            p, _ = weights(s, r[:, None], w[:, None], c[:, None], t[:, None], BOUND)
        if RAD == ELEMENTS:
            p = tl.where(kept(a_word[:, None], b_word[:, None], columns[None, :], dropped), p, 0.0)
        if RAD == KEYS:
            p = tl.where(kept(a_word, b_word, columns, dropped)[None, :], p, 0.0)
        v = load_rows(v_base, columns, values, stride_vn, stride_ve, keys, EV)
        sums = tl.dot(p.to(v.dtype), v, sums, input_precision=PRECISION)
    if BOUND == FREE:
        w = tl.where(top == -INF, 0.0, 1.0 / tl.maximum(total, TINY))
        sums = sums * w[:, None]
        stats = STATS + plane.to(tl.int64) * queries + rows
        tl.store(stats, tl.where(top == -INF, 0.0, top), mask=rows < queries)
        tl.store(stats + size, w, mask=rows < queries)
    sums = sums * factor
    offset = (plane.to(tl.int64) * queries + rows)[:, None] * EV + values[None, :]
    inside = (rows[:, None] < queries) & (values[None, :] < EV)
    tl.store(OUT + offset, sums.to(OUT.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------- backwards


@triton.jit
def pulls(s, r, w, c, t, r0, w0, BOUND: tl.constexpr, STRAIGHT: tl.constexpr):
    """P, X and W of a tile (see the module); the numbers of each row broadcast to it."""
    p, e = weights(s, r, w, c, t, BOUND)
    if STRAIGHT:
        x = tl.exp2(s - r0) * w0
        return p, x, x
    elif BOUND == CLAMP:
        return p, tl.where(e <= t, e, 0.0), e
    elif BOUND == CAP:
        x = tl.where((s > c) | (e >= t), 0.0, e)
        return p, x, x
    elif BOUND == SCALE:
        return p, p, tl.where(c == INF, e, (s >= c).to(tl.float32))
    else:
        return p, p, p


@triton.jit
def backward_q(
    Q,
    K,
    V,
    MASK_,
    SEEDS,
    OUT,
    STATS,
    GRAD,
    DQ,
    SHARE,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qe,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_ke,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ve,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_ge,
    heads,
    queries,
    keys,
    per_stream,
    size,
    scale,
    dropped,
    factor,
    natural,  # the scale of the scores itself
    E: tl.constexpr,
    EV: tl.constexpr,
    E2: tl.constexpr,
    EV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAD: tl.constexpr,
    STRAIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DQ, and what each row's W is multiplied with in SHARE (batch, heads, queries) float32."""
    blocks = tl.cdiv(queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < queries
    features, values = tl.arange(0, E2), tl.arange(0, EV2)
    k_base = K + b * stride_kb + h * stride_kh
    v_base = V + b * stride_vb + h * stride_vh
    mask_base = MASK_ + b * stride_mb + h * stride_mh
    q = load_rows(Q + b * stride_qb + h * stride_qh, rows, features, stride_qm, stride_qe, queries, E)
    grad = load_rows(GRAD + b * stride_gb + h * stride_gh, rows, values, stride_gm, stride_ge, queries, EV)
    first = plane.to(tl.int64) * queries
    out = load_rows(OUT + first * EV, rows, values, EV, 1, queries, EV)
    guess = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    stats = STATS + first + rows
    r, w = tl.load(stats, mask=exists, other=0.0), tl.load(stats + size, mask=exists, other=0.0)
    c, t, r0, w0 = r, w, r, w
    if BOUND != FREE:
        c = tl.load(stats + 2 * size, mask=exists, other=0.0)
        t = tl.load(stats + 3 * size, mask=exists, other=0.0)
        if STRAIGHT:
            r0 = tl.load(stats + 4 * size, mask=exists, other=0.0)
            w0 = tl.load(stats + 5 * size, mask=exists, other=0.0)
    if RAD != 0:
        seed = tl.load(SEEDS + b // per_stream)
        matrix = (b % per_stream) * heads + h
        if RAD == ELEMENTS:
            a_word, b_word = row_words(seed, matrix * queries + rows)
        else:
            a_word, b_word = row_words(seed, matrix)

    pulled = tl.zeros((BLOCK_M, E2), tl.float32)  # Σ (X∘G − guess·W) K
    pushed = tl.zeros((BLOCK_M, E2), tl.float32)  # Σ W K
    sum_pulled = tl.zeros((BLOCK_M,), tl.float32)
    sum_pushed = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum(keys, (block + 1) * BLOCK_M) if CAUSAL else keys
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, columns, features, stride_kn, stride_ke, keys, E)
        v = load_rows(v_base, columns, values, stride_vn, stride_ve, keys, EV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = masked_scores(
            s, rows[:, None], columns[None, :], mask_base, stride_mm, stride_mn, queries, keys, MASK, CAUSAL
        )
        g = tl.dot(grad, tl.trans(v), input_precision=PRECISION) * factor
        if RAD == ELEMENTS:
            g = tl.where(kept(a_word[:, None], b_word[:, None], columns[None, :], dropped), g, 0.0)
        if RAD == KEYS:
            g = tl.where(kept(a_word, b_word, columns, dropped)[None, :], g, 0.0)
        _, x, y = pulls(
            s, r[:, None], w[:, None], c[:, None], t[:, None], r0[:, None], w0[:, None], BOUND, STRAIGHT
        )  # fmt: skip
        x = x * g
        if BOUND != FREE:
            sum_pulled += tl.sum(x, 1)
            sum_pushed += tl.sum(y, 1)
            pushed = tl.dot(y.to(k.dtype), k, pushed, input_precision=PRECISION)
        pulled = tl.dot((x - guess[:, None] * y).to(k.dtype), k, pulled, input_precision=PRECISION)
    share = guess
    if BOUND != FREE:
        share = sum_pulled
        if not STRAIGHT:
            if BOUND == CAP:
                share = sum_pulled / tl.maximum(sum_pushed, TINY)
            if BOUND == SCALE:
                share = tl.where(c == INF, sum_pulled, sum_pulled / tl.maximum(sum_pushed, 1.0))
        pulled -= (share - guess)[:, None] * pushed
    tl.store(SHARE + first + rows, share, mask=exists)
    inside = exists[:, None] & (features[None, :] < E)
    offset = (first + rows)[:, None] * E + features[None, :]
    tl.store(DQ + offset, (pulled * natural).to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def backward_kv(
    Q,
    K,
    V,
    MASK_,
    SEEDS,
    STATS,
    GRAD,
    SHARE,
    DK,
    DV,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qe,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_ke,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ve,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_ge,
    heads,
    queries,
    keys,
    per_stream,
    size,
    scale,
    dropped,
    factor,
    natural,
    E: tl.constexpr,
    EV: tl.constexpr,
    E2: tl.constexpr,
    EV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAD: tl.constexpr,
    STRAIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DK and DV, contiguous. Tiles are transposed (keys, queries), so that no product needs another layout."""
    blocks = tl.cdiv(keys, BLOCK_N)
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    features, values = tl.arange(0, E2), tl.arange(0, EV2)
    q_base = Q + b * stride_qb + h * stride_qh
    grad_base = GRAD + b * stride_gb + h * stride_gh
    mask_base = MASK_ + b * stride_mb + h * stride_mh
    k = load_rows(K + b * stride_kb + h * stride_kh, columns, features, stride_kn, stride_ke, keys, E)
    v = load_rows(V + b * stride_vb + h * stride_vh, columns, values, stride_vn, stride_ve, keys, EV)
    first = plane.to(tl.int64) * queries
    if RAD != 0:
        seed = tl.load(SEEDS + b // per_stream)
        matrix = (b % per_stream) * heads + h
        if RAD == KEYS:
            a_word, b_word = row_words(seed, matrix)
            of_key = kept(a_word, b_word, columns, dropped)

    dk = tl.zeros((BLOCK_N, E2), tl.float32)
    dv = tl.zeros((BLOCK_N, EV2), tl.float32)
    start_row = (block * BLOCK_N // BLOCK_M) * BLOCK_M if CAUSAL else 0
    for start in range(start_row, queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        exists = rows < queries
        q = load_rows(q_base, rows, features, stride_qm, stride_qe, queries, E)
        grad = load_rows(grad_base, rows, values, stride_gm, stride_ge, queries, EV)
        stats = STATS + first + rows
        r, w = tl.load(stats, mask=exists, other=0.0), tl.load(stats + size, mask=exists, other=0.0)
        share = tl.load(SHARE + first + rows, mask=exists, other=0.0)
        c, t, r0, w0 = r, w, r, w
        if BOUND != FREE:
            c = tl.load(stats + 2 * size, mask=exists, other=0.0)
            t = tl.load(stats + 3 * size, mask=exists, other=0.0)
            if STRAIGHT:
                r0 = tl.load(stats + 4 * size, mask=exists, other=0.0)
                w0 = tl.load(stats + 5 * size, mask=exists, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        s = masked_scores(
            s, rows[None, :], columns[:, None], mask_base, stride_mm, stride_mn, queries, keys, MASK, CAUSAL
        )
        p, x, y = pulls(
            s, r[None, :], w[None, :], c[None, :], t[None, :], r0[None, :], w0[None, :], BOUND, STRAIGHT
        )  # fmt: skip
        g = tl.dot(v, tl.trans(grad), input_precision=PRECISION) * factor
        if RAD == ELEMENTS:
            a_word, b_word = row_words(seed, matrix * queries + rows)
            keep = kept(a_word[None, :], b_word[None, :], columns[:, None], dropped)
            p, g = tl.where(keep, p, 0.0), tl.where(keep, g, 0.0)
        if RAD == KEYS:
            p, g = tl.where(of_key[:, None], p, 0.0), tl.where(of_key[:, None], g, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = x * g - share[None, :] * y
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    first_key = plane.to(tl.int64) * keys
    exists = columns[:, None] < keys
    tl.store(
        DK + (first_key + columns)[:, None] * E + features[None, :],
        (dk * natural).to(DK.dtype.element_ty),
        mask=exists & (features[None, :] < E),
    )
    tl.store(
        DV + (first_key + columns)[:, None] * EV + values[None, :],
        (dv * factor).to(DV.dtype.element_ty),
        mask=exists & (values[None, :] < EV),
    )
