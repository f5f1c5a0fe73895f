// Paged FlashAttention (Dao et al. 2022, Algorithm 1; split over keys as in Dao 2023) for any mix
// of prompt chunks and decodes.
//
// A unit is up to 16 consecutive query tokens of one row at one KV head, so all grouped heads share
// each key and value it loads. Keys are taken in tiles of 64 at absolute positions with a running
// maximum m, sum l and unnormalised output o; at every 256 keys the running state is merged into
// the unit's total and starts afresh. A decode may therefore give each segment to another thread
// and merge afterwards, with the same bits. No score matrix exists beyond one tile a query group.
//
// head_dim is a multiple of 16. Row order of the `vectors` of a unit: token, then head of the group.
#pragma once

namespace twostroke::TS_ISA {

struct Unit {
  const AttentionArgs& args;
  int head_dim, vectors;
  float *q, *o, *total_o;            // [vector][head_dim]
  float* l;                          // [vector][16] lane sums
  float *total_l, *m, *total_m;      // [vector]
  float* p;                          // [8][kTileKeys] scores, then probabilities

  explicit Unit(const AttentionArgs& a)
      : args(a), head_dim(a.kv->head_dim), vectors(a.tokens * a.group) {
    const size_t most = static_cast<size_t>(a.group) * kQueryTile;
    q = a.scratch;
    o = q + most * head_dim;
    total_o = o + most * head_dim;
    l = total_o + most * head_dim;
    total_l = l + most * kLanes;
    m = total_l + most;
    total_m = m + most;
    p = total_m + most;
  }

  int position(int vector) const { return args.position + vector / args.group; }
  int first_key(int vector) const {
    const int first = position(vector) + 1 - args.window;
    return args.window > 0 && first > 0 ? first : 0;
  }
};

template <bool HALF>
inline F load_kv(const uint8_t* base, size_t index) {
  if constexpr (HALF) return F::load_f16(reinterpret_cast<const uint16_t*>(base) + index);
  return F::load(reinterpret_cast<const float*>(base) + index);
}

// Where the four 16-key blocks of a tile lie, and those of the next tile, to be fetched ahead.
// Blocks beyond the last key repeat the last one: what is computed from them is masked.
constexpr int kTileBlocks = kTileKeys / kLanes;
struct Tile {
  int first_key;
  const uint8_t *k[kTileBlocks], *v[kTileBlocks];
  const uint8_t *next_k[kTileBlocks], *next_v[kTileBlocks];

  Tile(const Unit& unit, int first_key, int end) : first_key(first_key) {
    const AttentionArgs& a = unit.args;
    const int last = (end - 1) / kLanes;
    for (int b = 0; b < kTileBlocks; ++b) {
      const int here = first_key / kLanes + b, next = here + kTileBlocks;
      const int block = a.blocks[here < last ? here : last];
      const int ahead = a.blocks[next < last ? next : last];
      k[b] = a.kv->keys(a.layer, block, a.kv_head);
      v[b] = a.kv->values(a.layer, block, a.kv_head);
      next_k[b] = a.kv->keys(a.layer, ahead, a.kv_head);
      next_v[b] = a.kv->values(a.layer, ahead, a.kv_head);
    }
  }
};

// p[i][key] = q[vector + i] . k[key] for the tile's keys around [from, to).
template <bool HALF, int N>
inline void score_tile(const Unit& unit, const Tile& tile, int vector, int from, int to) {
  constexpr int TOGETHER = N <= 4 ? 4 : 1;  // blocks at once: N * TOGETHER independent sums
  const int dim = unit.head_dim;
  const float* q = unit.q + static_cast<size_t>(vector) * dim;
  const int first = (from - tile.first_key) / kLanes / TOGETHER * TOGETHER;
  for (int block = first; block * kLanes < to - tile.first_key; block += TOGETHER) {
    F sums[N][TOGETHER];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
      for (int b = 0; b < TOGETHER; ++b) sums[i][b] = F::set(0.0f);
    }
    for (int d = 0; d < dim; ++d) {
      F column[TOGETHER];
#pragma GCC unroll 8
      for (int b = 0; b < TOGETHER; ++b) {
        column[b] = load_kv<HALF>(tile.k[block + b], static_cast<size_t>(d) * kLanes);
        if (HALF) __builtin_prefetch(tile.next_k[block + b] + d * kLanes * 2);
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const F value = F::set(q[i * dim + d]);
#pragma GCC unroll 8
        for (int b = 0; b < TOGETHER; ++b) sums[i][b] = fma(value, column[b], sums[i][b]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
      for (int b = 0; b < TOGETHER; ++b) {
        sums[i][b].store(unit.p + i * kTileKeys + (block + b) * kLanes);
      }
    }
  }
}

// Turns one vector's scores into probabilities against the new maximum, and rescales l; returns
// the factor for its old output. Keys outside [from, to) get probability 0.
inline float soften(const Unit& unit, int vector, float* p, int tile, int from, int to) {
  const float minus = -std::numeric_limits<float>::infinity();
  F best = F::set(minus);
  for (int j = 0; j < kTileKeys; j += kLanes) {
    const int first = from - tile - j, last = to - tile - j;
    F s = F::set(minus);
    if (last > 0 && first < kLanes) {
      s = keep_lanes(F::load(p + j), first > 0 ? first : 0, last < kLanes ? last : kLanes);
    }
    s.store(p + j);
    best = max(s, best);
  }
  const float old = unit.m[vector], now = std::fmax(old, reduce_max(best));
  const F top = F::set(now);
  F sum = F::set(0.0f);
  for (int j = 0; j < kTileKeys; j += kLanes) {
    const F e = exp16(F::load(p + j) - top);
    e.store(p + j);
    sum = sum + e;
  }
  alignas(64) float factor[kLanes];
  exp16(F::set(old - now)).store(factor);
  float* l = unit.l + static_cast<size_t>(vector) * kLanes;
  fma(F::load(l), F::set(factor[0]), sum).store(l);
  unit.m[vector] = now;
  return factor[0];
}

// o[i] = o[i] * factor[i] + sum over keys of p[i][key] v[key], key by key in order.
template <bool HALF, int N>
inline void gather_tile(const Unit& unit, const Tile& tile, int vector, const int* from,
                        const int* to, const float* factor) {
  const int dim = unit.head_dim;
  int first = from[0], last = to[0];
  bool even = true;  // all vectors see the same keys
  for (int i = 1; i < N; ++i) {
    even = even && from[i] == from[0] && to[i] == to[0];
    first = from[i] < first ? from[i] : first;
    last = to[i] > last ? to[i] : last;
  }
  float* o = unit.o + static_cast<size_t>(vector) * dim;
  constexpr int WIDE = N <= 4 ? 4 : 2;  // vectors of 16 dimensions kept in registers
  for (int d = 0; d < dim; d += WIDE * kLanes) {
    const int wide = (dim - d) / kLanes < WIDE ? (dim - d) / kLanes : WIDE;
    F sums[N][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
      for (int w = 0; w < WIDE; ++w) {
        sums[i][w] = w < wide ? F::load(o + i * dim + d + w * kLanes) * F::set(factor[i])
                              : F::set(0.0f);
      }
    }
    for (int block = first / kLanes * kLanes; block < last; block += kLanes) {
      const int index = (block - tile.first_key) / kLanes;
      const uint8_t* v = tile.v[index];
      const int begin = first > block ? first : block;
      const int end = last < block + kLanes ? last : block + kLanes;
      for (int key = begin; key < end; ++key) {
        F row[WIDE];
        const size_t at = static_cast<size_t>(key - block) * dim + d;
        if (HALF) {
          for (int w = 0; w < wide; w += 2) __builtin_prefetch(tile.next_v[index] + 2 * at + 32 * w);
        }
#pragma GCC unroll 8
        for (int w = 0; w < WIDE; ++w) {
          if (w < wide) {
            row[w] = load_kv<HALF>(v, at + w * kLanes);
          } else {
            row[w] = F::set(0.0f);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          if (!even && (key < from[i] || key >= to[i])) continue;
          const F weight = F::set(unit.p[i * kTileKeys + (key - tile.first_key)]);
#pragma GCC unroll 8
          for (int w = 0; w < WIDE; ++w) sums[i][w] = fma(weight, row[w], sums[i][w]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      for (int w = 0; w < wide; ++w) sums[i][w].store(o + i * dim + d + w * kLanes);
    }
  }
}

// Vectors vector … vector + N - 1 against the keys of one tile, which ends at `limit`.
template <bool HALF, int N>
inline void visit_tile(const Unit& unit, const Tile& tile, int vector, int limit) {
  int from[N], to[N], first = limit, last = tile.first_key;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const int start = unit.first_key(vector + i), end = unit.position(vector + i) + 1;
    from[i] = start > tile.first_key ? start : tile.first_key;
    to[i] = end < limit ? end : limit;
    if (from[i] >= to[i]) from[i] = to[i] = tile.first_key;  // sees nothing here
    if (from[i] < to[i]) {
      first = from[i] < first ? from[i] : first;
      last = to[i] > last ? to[i] : last;
    }
  }
  if (first >= last) return;
  score_tile<HALF, N>(unit, tile, vector, first, last);
  float factor[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    factor[i] = 1.0f;
    if (from[i] < to[i]) {
      factor[i] =
          soften(unit, vector + i, unit.p + i * kTileKeys, tile.first_key, from[i], to[i]);
    }
  }
  gather_tile<HALF, N>(unit, tile, vector, from, to, factor);
}

template <bool HALF>
inline void visit_vectors(const Unit& unit, const Tile& tile, int limit) {
  int v = 0;
  for (; v + 8 <= unit.vectors; v += 8) visit_tile<HALF, 8>(unit, tile, v, limit);
  for (; v + 4 <= unit.vectors; v += 4) visit_tile<HALF, 4>(unit, tile, v, limit);
  for (; v + 3 <= unit.vectors; v += 3) visit_tile<HALF, 3>(unit, tile, v, limit);
  for (; v + 2 <= unit.vectors; v += 2) visit_tile<HALF, 2>(unit, tile, v, limit);
  for (; v < unit.vectors; ++v) visit_tile<HALF, 1>(unit, tile, v, limit);
}

inline void visit_segment(const Unit& unit, int begin, int end) {
  const float minus = -std::numeric_limits<float>::infinity();
  std::memset(unit.o, 0, sizeof(float) * unit.vectors * unit.head_dim);
  std::memset(unit.l, 0, sizeof(float) * unit.vectors * kLanes);
  for (int i = 0; i < unit.vectors; ++i) unit.m[i] = minus;
  for (int key = begin; key < end; key += kTileKeys) {
    const int limit = key + kTileKeys < end ? key + kTileKeys : end;
    if (limit <= unit.first_key(0)) continue;  // before every query's window
    const Tile tile(unit, key, end);
    if (unit.args.kv->half) {
      visit_vectors<true>(unit, tile, limit);
    } else {
      visit_vectors<false>(unit, tile, limit);
    }
  }
}

// total = total * e^(total_m - m) + part * e^(part_m - m): one step of the merge of two softmaxes.
inline void merge_one(float* total_o, float& total_m, float& total_l, const float* part_o,
                      float part_m, float part_l, int head_dim) {
  const float now = std::fmax(total_m, part_m);
  if (now == -std::numeric_limits<float>::infinity()) return;  // neither has seen a key
  alignas(64) float a[kLanes], b[kLanes];
  exp16(F::set(total_m - now)).store(a);
  exp16(F::set(part_m - now)).store(b);
  const F scale = F::set(a[0]), part_scale = F::set(b[0]);
  for (int d = 0; d < head_dim; d += kLanes) {
    fma(F::load(total_o + d), scale, F::load(part_o + d) * part_scale).store(total_o + d);
  }
  total_l = __builtin_fmaf(total_l, a[0], part_l * b[0]);
  total_m = now;
}

inline void write_normalised(const float* o, float l, int head_dim, float* y) {
  const F inverse = F::set(1.0f / l);
  for (int d = 0; d < head_dim; d += kLanes) (F::load(o + d) * inverse).store(y + d);
}

inline void attention(const AttentionArgs& args) {
  const Unit unit(args);
  const int dim = unit.head_dim;
  const F scale = F::set(args.scale);
  for (int v = 0; v < unit.vectors; ++v) {
    const float* source = args.q + v / args.group * args.stride + v % args.group * dim;
    for (int d = 0; d < dim; d += kLanes) {
      (F::load(source + d) * scale).store(unit.q + static_cast<size_t>(v) * dim + d);
    }
    unit.total_m[v] = -std::numeric_limits<float>::infinity();
    unit.total_l[v] = 0.0f;
  }
  std::memset(unit.total_o, 0, sizeof(float) * unit.vectors * dim);
  const int end_key = args.position + args.tokens;
  for (int segment = args.first_segment; segment < args.last_segment; ++segment) {
    const int begin = segment * kSegmentKeys;
    const int end = begin + kSegmentKeys < end_key ? begin + kSegmentKeys : end_key;
    visit_segment(unit, begin, end);
    for (int v = 0; v < unit.vectors; ++v) {
      const float* o = unit.o + static_cast<size_t>(v) * dim;
      const float l = reduce_add(F::load(unit.l + static_cast<size_t>(v) * kLanes));
      if (args.partial != nullptr) {
        float* out = args.partial + v * partial_floats(dim);
        std::memcpy(out, o, sizeof(float) * dim);
        out[dim] = unit.m[v];
        out[dim + 1] = l;
      } else {
        merge_one(unit.total_o + static_cast<size_t>(v) * dim, unit.total_m[v], unit.total_l[v], o,
                  unit.m[v], l, dim);
      }
    }
  }
  if (args.partial != nullptr) return;
  for (int v = 0; v < unit.vectors; ++v) {
    write_normalised(unit.total_o + static_cast<size_t>(v) * dim, unit.total_l[v], dim,
                     args.y + v / args.group * args.stride + v % args.group * dim);
  }
}

// Merges the partial results of one head's segments, in order; partials lie one after another.
inline void merge(const float* partials, int segments, int head_dim, float* y) {
  float m = -std::numeric_limits<float>::infinity(), l = 0.0f;
  std::memset(y, 0, sizeof(float) * head_dim);
  for (int s = 0; s < segments; ++s) {
    const float* part = partials + s * partial_floats(head_dim);
    merge_one(y, m, l, part, part[head_dim], part[head_dim + 1], head_dim);
  }
  write_normalised(y, l, head_dim, y);
}

}  // namespace twostroke::TS_ISA
