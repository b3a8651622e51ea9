"""Attention of a packed step in two CUDA kernels: each token reads its own row of the pools, whatever the others do.

MLX's own kernels want rows of one width and a mask, or fall back to a handful of operations, and prepare a kernel for
every new shape. Here slots, lengths and widths are data, so a step's shape is its number of tokens alone.
The sum is computed online (Milakov & Gimelshein, arXiv 1805.02867): a group of threads takes a key at a time, and all
groups' parts are joined at the end.

Before that another kernel makes rotary embeddings and writes keys and values, in the place of four of MLX's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from worker.cache.wiring import AttentionForm

THREADS = 256
HEAD_DIMS = (64, 128, 256)
MOST_SHARED_HEADS = 4  # query heads that one block computes for their common key head
_LOG2_E = 1.4426950408889634

# One warp for each head of each token: queries first, then keys, then values.
_TAKE_IN = """
  constexpr int ALL = HEADS + 2 * KV_HEADS;
  int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  int lane = threadIdx.x % 32;
  int token = warp / ALL, head = warp % ALL;
  if (token >= queries_shape[0]) return;
  int position = positions[token];
  const T* from;
  long long stride;
  T* to;
  if (head < HEADS) {
    from = queries + token * queries_strides[0] + head * queries_strides[1];
    stride = queries_strides[3];
    to = rotated + (static_cast<long long>(token) * HEADS + head) * D;
  } else {
    bool is_key = head < HEADS + KV_HEADS;
    int own = (head - HEADS) % KV_HEADS;
    from = is_key ? keys + token * keys_strides[0] + own * keys_strides[1]
                  : values + token * values_strides[0] + own * values_strides[1];
    stride = is_key ? keys_strides[3] : values_strides[3];
    long long row = (static_cast<long long>(slots[token]) * KV_HEADS + own) * pool_k_shape[2] + position;
    to = const_cast<T*>(is_key ? pool_k : pool_v) + row * D;
  }
  int first = 0;
  if (head < HEADS + KV_HEADS) {
    for (int i = lane; i < DIMS / 2; i += 32) {
      int a = IS_TRADITIONAL ? 2 * i : i, b = IS_TRADITIONAL ? 2 * i + 1 : i + DIMS / 2;
      float x = static_cast<float>(from[a * stride]), y = static_cast<float>(from[b * stride]);
      float sine, cosine;
      sincosf(static_cast<float>(position) * rates[i], &sine, &cosine);
      to[a] = static_cast<T>(x * cosine - y * sine);
      to[b] = static_cast<T>(x * sine + y * cosine);
    }
    first = DIMS;
  }
  for (int i = first + lane; i < D; i += 32) to[i] = from[i * stride];
"""

_SOURCE = """
  constexpr int LANES = D / 8;             // threads that share a key, 8 elements each
  constexpr int WORKERS = THREADS / LANES; // keys in flight
  constexpr int WARPS = THREADS / 32;
  int part = blockIdx.x % PARTS;
  int kv_head = (blockIdx.x / PARTS) % KV_HEADS;
  int token = blockIdx.x / (PARTS * KV_HEADS);
  int lane = threadIdx.x % LANES;
  int worker = threadIdx.x / LANES;
  int position = positions[token];
  long long row = (static_cast<long long>(slots[token]) * KV_HEADS + kv_head) * keys_shape[2];
  const Pack<T>* own_keys = reinterpret_cast<const Pack<T>*>(keys + row * D) + lane;
  const Pack<T>* own_values = reinterpret_cast<const Pack<T>*>(values + row * D) + lane;
  int first_head = kv_head * PARTS * HEADS + part * HEADS;
  long long at = (static_cast<long long>(token) * KV_HEADS * PARTS * HEADS + first_head) * D;

  float query[HEADS][8], sum[HEADS][8], best[HEADS], total[HEADS];
  for (int h = 0; h < HEADS; h++) {
    Pack<T> q = *(reinterpret_cast<const Pack<T>*>(queries + at + h * D) + lane);
    for (int i = 0; i < 8; i++) {
      query[h][i] = static_cast<float>(q.value[i]) * scale[0];
      sum[h][i] = 0.0f;
    }
    best[h] = -1e30f;
    total[h] = 0.0f;
  }

  int first = WINDOW > 0 && position >= WINDOW ? position - WINDOW + 1 : 0;
  for (int base = first; base <= position; base += WORKERS) {
    int key = base + worker;
    bool is_seen = key <= position;
    Pack<T> k, v;
    if (is_seen) {
      k = own_keys[key * LANES];
      v = own_values[key * LANES];
    }
    for (int h = 0; h < HEADS; h++) {
      float score = 0.0f;
      if (is_seen) {
        for (int i = 0; i < 8; i++) score += query[h][i] * static_cast<float>(k.value[i]);
      }
      for (int d = LANES / 2; d > 0; d /= 2) score += __shfl_xor_sync(0xffffffff, score, d);
      if (is_seen) {
        float highest = max(best[h], score);
        float factor = exp2f(best[h] - highest);
        float weight = exp2f(score - highest);
        best[h] = highest;
        total[h] = total[h] * factor + weight;
        for (int i = 0; i < 8; i++) sum[h][i] = sum[h][i] * factor + weight * static_cast<float>(v.value[i]);
      }
    }
  }

  // Join the workers of a warp, then the warps.
  __shared__ float sums[WARPS][HEADS][D];
  __shared__ float bests[WARPS][HEADS];
  __shared__ float totals[WARPS][HEADS];
  int warp = threadIdx.x / 32;
  for (int h = 0; h < HEADS; h++) {
    for (int d = LANES; d < 32; d *= 2) {
      float other_best = __shfl_xor_sync(0xffffffff, best[h], d);
      float highest = max(best[h], other_best);
      float factor = exp2f(best[h] - highest);
      float other_factor = exp2f(other_best - highest);
      total[h] = total[h] * factor + __shfl_xor_sync(0xffffffff, total[h], d) * other_factor;
      for (int i = 0; i < 8; i++) {
        sum[h][i] = sum[h][i] * factor + __shfl_xor_sync(0xffffffff, sum[h][i], d) * other_factor;
      }
      best[h] = highest;
    }
    if (threadIdx.x % 32 < LANES) {
      for (int i = 0; i < 8; i++) sums[warp][h][lane * 8 + i] = sum[h][i];
      if (lane == 0) {
        bests[warp][h] = best[h];
        totals[warp][h] = total[h];
      }
    }
  }
  __syncthreads();
  for (int element = threadIdx.x; element < HEADS * D; element += THREADS) {
    int h = element / D, d = element % D;
    float highest = -1e30f, all = 0.0f, result = 0.0f;
    for (int w = 0; w < WARPS; w++) highest = max(highest, bests[w][h]);
    for (int w = 0; w < WARPS; w++) {
      float factor = exp2f(bests[w][h] - highest);
      all += totals[w][h] * factor;
      result += sums[w][h][d] * factor;
    }
    output[at + element] = static_cast<T>(result / all);
  }
"""

_HEADER = """
template <typename T>
struct alignas(8 * sizeof(T)) Pack {
  T value[8];
};
"""


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary embedding of the first `dims` elements: pairs of neighbours (traditional), or of the two halves.

    `rates` float32 [dims / 2]: radians per position, of each pair.
    """

    dims: int
    is_traditional: bool
    rates: mx.array


def is_usable(form: AttentionForm) -> bool:
    """Whether the kernel can compute such attention."""
    is_even = form.head_dim == form.value_dim and form.heads % form.kv_heads == 0
    return is_even and form.head_dim in HEAD_DIMS and form.dtype.size == 2 and not form.has_options


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    slots: mx.array,
    positions: mx.array,
    scale: float,
    window: int | None,
) -> mx.array:
    """Each token attends to its slot up to its own position, or to the last `window` positions of that.

    queries [tokens, heads, 1, head_dim]; keys and values, the pools as they are [slots, kv_heads, capacity, head_dim];
    slots and positions int32 [tokens]; returns [tokens, heads, 1, head_dim].
    """
    tokens, heads, _, head_dim = queries.shape
    kv_heads = keys.shape[1]
    shared = heads // kv_heads
    together = max(h for h in range(1, MOST_SHARED_HEADS + 1) if shared % h == 0)
    blocks = tokens * kv_heads * (shared // together)
    output: mx.array = _kernel()(
        inputs=[queries, keys, values, slots, positions, _scale(scale)],
        template=[
            ("T", queries.dtype),
            ("D", head_dim),
            ("KV_HEADS", kv_heads),
            ("HEADS", together),
            ("PARTS", shared // together),
            ("WINDOW", window or 0),
            ("THREADS", THREADS),
        ],
        grid=(blocks * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )[0]
    return output


def taken_in(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    pools: Sequence[mx.array],
    slots: mx.array,
    positions: mx.array,
    rotary: Rotary | None,
) -> tuple[mx.array, list[mx.array]]:
    """Write keys and values to their places in the pools; returns the queries, and the pools as they are then.

    queries [tokens, heads, 1, head_dim], keys and values [tokens, kv_heads, 1, head_dim], of any strides; queries and
    keys are rotated if `rotary` says how. pools, slots and positions as in `attention`.

    The pools are written in place, of which MLX knows nothing. So those that are returned wait for the kernel, whether
    or not anybody wants the queries; copies of those that were given must have been evaluated before.
    """
    tokens, heads, _, head_dim = queries.shape
    kv_heads = keys.shape[1]
    threads = tokens * (heads + 2 * kv_heads) * 32
    (rotated,) = _take_in()(
        inputs=[queries, keys, values, *pools, slots, positions, rotary.rates if rotary else _unused()],
        template=[
            ("T", queries.dtype),
            ("D", head_dim),
            ("DIMS", rotary.dims if rotary else 0),
            ("IS_TRADITIONAL", bool(rotary and rotary.is_traditional)),
            ("HEADS", heads),
            ("KV_HEADS", kv_heads),
        ],
        grid=(-(-threads // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return rotated, list(mx.depends(list(pools), [rotated]))


@cache
def _take_in() -> Any:
    return mx.fast.cuda_kernel(
        name="take_in",
        input_names=["queries", "keys", "values", "pool_k", "pool_v", "slots", "positions", "rates"],
        output_names=["rotated"],
        source=_TAKE_IN,
        ensure_row_contiguous=False,
    )


@cache
def _unused() -> mx.array:
    return mx.zeros(1)


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="token_attention",
        input_names=["queries", "keys", "values", "slots", "positions", "scale"],
        output_names=["output"],
        source=_SOURCE,
        header=_HEADER,
    )


@cache
def _scale(scale: float) -> mx.array:
    return mx.array([scale * _LOG2_E], dtype=mx.float32)
