"""Attention on a TPU as one kernel: scores stay in the chip's vector memory, and no array is transposed.

A TPU computes in rows of 128 lanes, and its matrix unit multiplies tiles of 128 × 128. Heads of 40 or 64 are therefore
*packed*: several lie beside each other in 128 lanes, a *group*; lanes that are left over are zeros. The packed
layout costs nothing: the projections write it by themselves, from weights whose columns are packed (`pack`), and the
projection after the attention reads it with packed rows. Within a group a head is singled out by zeros in the lanes of
the others, so that no lane ever moves.

The keys of a prompt may count in part, in each row as many as its own prompt has. Such a kernel has code for one tile
of keys, in which a prompt of one window fits, and code for all; which of them runs depends on the row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdtpu_worker.models.kernel_cost import kernel_cost
from sdtpu_worker.models.vector_memory import vector_memory

LANES = 128
OF_WINDOWS = "_of_windows"
"""What the name of a kernel ends with that has code for one tile of keys and code for all, for `sdtpu plan`."""
_LOWEST = -1e30  # a score of this vanishes in the softmax; an infinity would make NaN of its difference with itself


@dataclass(frozen=True)
class Packing:
    """Where the heads of a layer lie in packed lanes.

    Attributes:
        heads: of the layer.
        dim: of a head.
        is_even: all groups hold the same number of heads; otherwise each as many as fit, and the last one what is left.
    """

    heads: int
    dim: int
    is_even: bool = False

    @property
    def heads_per_group(self) -> int:
        """How many heads lie in one group."""
        most = max(1, LANES // self.dim)
        return max(count for count in range(1, most + 1) if self.heads % count == 0) if self.is_even else most

    @property
    def lanes(self) -> int:
        """Lanes of a group, a multiple of 128."""
        return -(-self.heads_per_group * self.dim // LANES) * LANES

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return -(-self.heads // self.heads_per_group)

    @property
    def heads_of_last(self) -> int:
        """Heads in the last group."""
        return self.heads - (self.groups - 1) * self.heads_per_group

    @property
    def width(self) -> int:
        """Lanes of all groups."""
        return self.groups * self.lanes

    @property
    def ones_lane(self) -> int | None:
        """The lane of a group that holds ones in packed values, if one is left over."""
        used = self.heads_per_group * self.dim
        return used if used < self.lanes else None

    def pack(self, x: jax.Array, axis: int = -1) -> jax.Array:
        """Return an array whose axis of `heads · dim` has `width` lanes, zeros in those of no head."""
        axis %= x.ndim
        before, after, used = x.shape[:axis], x.shape[axis + 1 :], self.heads_per_group * self.dim
        x = _fill_up(x, axis, self.groups * used).reshape(*before, self.groups, used, *after)
        return _fill_up(x, axis + 1, self.lanes).reshape(*before, self.width, *after)

    def unpack(self, x: jax.Array) -> jax.Array:
        """Return `(…, width)` as `(…, heads · dim)`."""
        leading = x.shape[:-1]
        x = x.reshape(*leading, self.groups, self.lanes)[..., : self.heads_per_group * self.dim]
        return x.reshape(*leading, -1)[..., : self.heads * self.dim]

    def ones(self, dtype: Any) -> jax.Array:
        """Return `(width,)`, one in the lane of ones of each group and zero elsewhere: the bias of packed values."""
        lane = jnp.arange(self.width) % self.lanes
        return (lane == (-1 if self.ones_lane is None else self.ones_lane)).astype(dtype)


def _fill_up(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Return an array with zeros at the end of an axis, so that it has this length."""
    return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def packed_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    packing: Packing,
    *,
    offsets: tuple[int, int, int] = (0, 0, 0),
    num_keys: int | jax.Array | None = None,
    block_queries: int,
    with_lse: bool = False,
    interpret: bool = False,
) -> Any:
    """Return scaled dot-product attention of packed heads.

    Args:
        queries: `(B, Lq, …)`, whose lanes from `offsets[0]` groups on are the packed queries; bfloat16 or float32.
        keys: `(B, Lk, …)`, likewise from `offsets[1]` groups on. May be the same array as the queries.
        values: `(B, Lk, …)`, likewise from `offsets[2]` groups on, with `Packing.ones` added unless `num_keys` is an
            array.
        packing: of the heads; an even one.
        offsets: in groups.
        num_keys: how many of the keys count; the rest is there to fill the tiles. Of each row, `(B,) int32`, then Lk
            need not fill tiles; or of all, then it does. None for all keys.
        block_queries: how many queries one step of the kernel takes; divides Lq.
        with_lse: also return the logarithms of the sums of exponentials.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, Lq, width)` in the dtype of the values, zeros in the lanes of no head. With `with_lse` also
        `(B, Lq, width) float32`, in each lane that of its head, to combine attentions to several sets of keys.

    Raises:
        ValueError: the blocks do not divide the queries; a kernel would leave the rest as it was, without a word. Or
            the packing is not even; a kernel would need code for both kinds of groups.
    """
    batch, num_queries, _ = queries.shape
    if num_queries % block_queries:
        raise ValueError(f"block_queries must divide the {num_queries} queries, got {block_queries}")
    if packing.heads_of_last != packing.heads_per_group:
        raise ValueError(f"all groups must hold the same number of heads, got {packing}")
    lanes, key_rows, counts = packing.lanes, keys.shape[1], list[jax.Array]()
    if num_keys is None or isinstance(num_keys, int):
        kernel = partial(_kernel, packing=packing, num_keys=num_keys or key_rows)
    else:
        key_rows, counts = whole_tiles(key_rows), [num_keys]
        kernel = partial(_kernel_by_row, packing=packing)

    def block(rows: int, offset: int, follows_queries: bool) -> pl.BlockSpec:
        return pl.BlockSpec((1, rows, lanes), lambda b, g, i, *_: (b, i if follows_queries else 0, g + offset))

    blocks = [((rows, lanes), queries.dtype) for rows in (block_queries, key_rows, key_rows, block_queries)]
    memory = vector_memory(blocks, block_queries * key_rows) + with_lse * 8 * block_queries * lanes
    shapes = [jax.ShapeDtypeStruct((batch, num_queries, packing.width), values.dtype)]
    shapes += [jax.ShapeDtypeStruct(shapes[0].shape, jnp.float32)] * with_lse
    scores = batch * packing.heads * num_queries * usual_keys(key_rows, num_keys)
    of_keys = jax.ShapeDtypeStruct((batch, keys.shape[1], packing.width), keys.dtype)
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(counts),
            grid=(batch, packing.groups, num_queries // block_queries),
            in_specs=[
                block(block_queries, offsets[0], True),
                block(key_rows, offsets[1], False),
                block(key_rows, offsets[2], False),
            ],
            out_specs=[block(block_queries, 0, True)] * len(shapes),
        ),
        out_shape=shapes,
        cost_estimate=kernel_cost(4 * scores * lanes, [shapes[0], of_keys, of_keys, *shapes], scores),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory
        ),
        interpret=interpret,
        name="packed_attention" + OF_WINDOWS * (len(counts) > 0 and key_rows > LANES),
    )(*counts, queries, keys, values)
    return tuple(found) if with_lse else found[0]


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, *out_refs: Any, packing: Packing, num_keys: int) -> None:
    """Attend with a block of queries of one group to all keys of the group."""
    _attend(q_ref[0], k_ref[0], v_ref[0], out_refs, packing, num_keys)


def _kernel_by_row(counts: Any, q_ref: Any, k_ref: Any, v_ref: Any, *out_refs: Any, packing: Packing) -> None:
    """Attend with a block of queries of one group to the keys that count in its row."""
    count = counts[pl.program_id(0)]

    def attend(key_rows: int) -> None:
        values = counting_values(v_ref[0, :key_rows], count, packing)
        _attend(q_ref[0], k_ref[0, :key_rows], values, out_refs, packing, count)

    by_count(count, k_ref.shape[1], attend)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out_refs: tuple[Any, ...],
    packing: Packing,
    num_keys: int | jax.Array,
) -> None:
    """Write the attention of the heads of a group, and where it is wanted the logarithm of the sums.

    The heads stand one after the other in straight code, not in a loop: the compiler then begins a head's products
    while it still weighs those of the head before, which a v5e rewards with a fifth of the time.
    """

    found = attend_group(q, k, v, packing, num_keys, packing.heads_per_group, len(out_refs))
    for ref, each in zip(out_refs, found, strict=True):
        ref[0] = each.astype(ref.dtype)


def whole_tiles(num_keys: int) -> int:
    """Return a number of keys filled up to whole tiles."""
    return -(-num_keys // LANES) * LANES


def usual_keys(key_rows: int, num_keys: int | jax.Array | None) -> int:
    """Return how many of the keys a kernel looks at as a rule: most prompts fit in one tile, see `by_count`."""
    return min(key_rows, LANES) if isinstance(num_keys, jax.Array) else key_rows


def by_count(count: jax.Array, key_rows: int, attend: Callable[[int], None]) -> None:
    """Run in a kernel the code for one tile of keys where a row's own fit in it, and else the code for all."""
    if key_rows <= LANES:
        attend(key_rows)
    else:
        jax.lax.cond(count <= LANES, partial(attend, LANES), partial(attend, key_rows))


def counting_values(v: jax.Array, count: jax.Array, packing: Packing) -> jax.Array:
    """Return packed values `(keys, groups · lanes)` inside a kernel, with ones in their lane and zeros for keys that do
    not count: what lies there may be no number at all.
    """
    key, lane = (jax.lax.broadcasted_iota(jnp.int32, v.shape, axis) for axis in (0, 1))
    if packing.ones_lane is not None:
        v = jnp.where(lane % packing.lanes == packing.ones_lane, jnp.ones_like(v), v)
    return jnp.where(key < count, v, jnp.zeros_like(v))


def attend_group(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    packing: Packing,
    num_keys: int | jax.Array,
    heads: int,
    num_results: int = 1,
) -> list[jax.Array]:
    """Return the attention of the first heads of a group inside a kernel.

    Args:
        q: `(queries, lanes)`.
        k, v: `(keys, lanes)`.
        packing: of the heads.
        num_keys: how many of the keys count.
        heads: how many of the group.
        num_results: 2 for the logarithms of the sums too.

    Returns:
        Arrays `(queries, lanes) float32`.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, q.shape, 1)
    found = [jnp.zeros(q.shape, jnp.float32) for _ in range(num_results)]
    scale = packing.dim**-0.5
    for head in range(heads):
        is_mine = (lane >= head * packing.dim) & (lane < (head + 1) * packing.dim)
        own = jnp.where(is_mine, q, jnp.zeros_like(q)) if packing.heads_per_group > 1 else q
        scores = jax.lax.dot_general(own, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if not isinstance(num_keys, int) or num_keys < k.shape[0]:
            key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(key < num_keys, scores, _LOWEST)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp((scores - highest) * scale)
        summed = jax.lax.dot_general(
            weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        ones = packing.ones_lane
        total = weights.sum(-1, keepdims=True) if ones is None else summed[:, ones : ones + 1]
        of_head = [summed / total, highest * scale + jnp.log(total)]
        found = [jnp.where(is_mine, each, before) for each, before in zip(of_head, found, strict=False)]
    return found
