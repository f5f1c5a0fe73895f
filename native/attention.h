// Paged FlashAttention (Dao et al. 2022, Algorithm 1; split over keys as in Dao 2023) for any mix
// of prompt chunks and decodes.
//
// A unit is up to 16 consecutive query tokens of one row at one KV head, so all grouped heads share
// each key and value it loads. Keys are taken in segments of 256 at absolute positions: a segment's
// scores give its maximum m, sum l and unnormalised output o, which are merged into the running
// state. A decode may therefore give each segment to another thread and merge afterwards, with the
// same bits. No score matrix exists beyond one segment of six vectors.
//
// A score is one chain of fused multiply-adds over the dimensions, an output one over a segment's
// keys; how many vectors and columns are computed together changes no bit. Queries are scaled by
// log2(e) as well, so probabilities are powers of two.
//
// head_dim is a multiple of 16. Row order of the `vectors` of a unit: token, then head of the group.
#pragma once

namespace twostroke::TS_ISA {

constexpr int kSegmentBlocks = kSegmentKeys / kLanes;

struct Unit {
  const AttentionArgs& args;
  int head_dim, vectors;
  float *q, *total_o;         // [vector][head_dim]
  float *total_m, *total_l;   // [vector], readable kLanes beyond the last
  float* p;                   // [kTogether][kSegmentKeys] scores, then probabilities
  float* partial;             // the segment's, or null

  explicit Unit(const AttentionArgs& a)
      : args(a), head_dim(a.kv->head_dim), vectors(a.tokens * a.group), partial(a.partial) {
    const size_t most = static_cast<size_t>(a.group) * kQueryTile;
    q = a.scratch;
    total_o = q + most * head_dim;
    p = total_o + most * head_dim;
    total_m = p + kTogether * kSegmentKeys;
    total_l = total_m + most + kLanes;
  }

  int position(int vector) const { return args.position + vector / args.group; }
  int first_key(int vector) const {
    const int first = position(vector) + 1 - args.window;
    return args.window > 0 && first > 0 ? first : 0;
  }
};

template <KvElement E>
inline F load_kv(const uint8_t* base, size_t index) {
  if constexpr (E == KvElement::int8) return F::load_i8(base + index);
  if constexpr (E == KvElement::f16) {
    return F::load_f16(reinterpret_cast<const uint16_t*>(base) + index);
  }
  return F::load(reinterpret_cast<const float*>(base) + index);
}

template <int BYTES>
inline void prefetch(const uint8_t* p) {
  for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i);
}

// Where a segment's blocks lie, from the first that any of the unit's queries sees. Memory is read
// as one stream of blocks, keys before values, and fetched kAheadBlocks ahead.
struct Segment {
  int first_key, end, blocks;
  const uint8_t* stream[2 * kSegmentBlocks + kAheadBlocks + kColumns];

  Segment(const Unit& unit, int segment) {
    const AttentionArgs& a = unit.args;
    const int begin = segment * kSegmentKeys, limit = a.position + a.tokens;
    const int seen = unit.first_key(0) / kLanes * kLanes;
    first_key = seen > begin ? seen : begin;
    end = begin + kSegmentKeys < limit ? begin + kSegmentKeys : limit;
    blocks = (end - first_key + kLanes - 1) / kLanes;
    for (int b = 0; b < blocks; ++b) {
      const int block = a.blocks[first_key / kLanes + b];
      stream[b] = a.kv->keys(a.layer, block, a.kv_head);
      stream[blocks + b] = a.kv->values(a.layer, block, a.kv_head);
    }
    const int most = (limit - 1) / kLanes;
    for (int b = 0; b < kAheadBlocks + kColumns; ++b) {
      const uint8_t* next = stream[2 * blocks - 1];
      if (segment + 1 < a.last_segment) {
        const int at = end / kLanes + b;
        next = a.kv->keys(a.layer, a.blocks[at < most ? at : most], a.kv_head);
      } else if (b < kAheadBlocks && a.next[b] != nullptr) {
        next = a.next[b];
      }
      stream[2 * blocks + b] = next;
    }
  }
  const uint8_t* keys(int b) const { return stream[b < blocks ? b : blocks - 1]; }
  const uint8_t* values(int b) const { return stream[blocks + b]; }
};

// N vectors of a unit and the keys [from, to) of the segment that each of them sees, as places in
// the segment; [first, last) is what any sees, [all_first, all_last) what all see.
template <int N>
struct Group {
  int vector, first, last, all_first, all_last;
  int from[N], to[N];

  Group(const Unit& unit, const Segment& segment, int vector) : vector(vector) {
    const int size = segment.end - segment.first_key;
    first = size;
    last = all_first = 0;
    all_last = size;
    for (int i = 0; i < N; ++i) {
      const int start = unit.first_key(vector + i) - segment.first_key;
      const int stop = unit.position(vector + i) + 1 - segment.first_key;
      from[i] = start > 0 ? start : 0;
      to[i] = stop < size ? stop : size;
      if (from[i] >= to[i]) from[i] = to[i] = 0;  // sees nothing here
      if (from[i] < to[i] && from[i] < first) first = from[i];
      if (to[i] > last) last = to[i];
      if (from[i] > all_first) all_first = from[i];
      if (to[i] < all_last) all_last = to[i];
    }
    if (all_first > all_last) all_first = all_last = last;
    if (all_first < first) all_first = all_last = first;
  }
};

// p[i][key] = q[vector + i] . k[key] for the keys of COLUMNS blocks.
template <KvElement E, int N, int COLUMNS>
inline void score_blocks(const Unit& unit, const Segment& segment, int vector, int block) {
  constexpr int BYTES = COLUMNS * kLanes * get_bytes(E);  // read for one dimension
  const int dim = unit.head_dim;
  const float* q = unit.q + static_cast<size_t>(vector) * dim;
  F sums[N][COLUMNS];
  const uint8_t* k[COLUMNS];
#pragma GCC unroll 8
  for (int c = 0; c < COLUMNS; ++c) {
    k[c] = segment.keys(block + c);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[i][c] = F::set(0.0f);
  }
  for (int part = 0, d = 0; part < COLUMNS; ++part) {
    const uint8_t* ahead = segment.stream[block + part + kAheadBlocks];
    if (E == KvElement::int8) prefetch<128>(ahead + unit.args.kv->value_bytes);  // its scales
    for (const int stop = d + dim / COLUMNS; d < stop; ++d, ahead += BYTES) {
      prefetch<BYTES>(ahead);
      F column[COLUMNS];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) {
        column[c] = load_kv<E>(k[c], static_cast<size_t>(d) * kLanes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const F value = F::set(q[i * dim + d]);
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) sums[i][c] = fma(value, column[c], sums[i][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) {
      if (E == KvElement::int8) sums[i][c] = sums[i][c] * F::load(unit.args.kv->scales(k[c]));
      sums[i][c].store(unit.p + i * kSegmentKeys + (block + c) * kLanes);
    }
  }
}

// Scores of all blocks that hold keys any of the group sees, and perhaps of one more.
template <KvElement E, int N>
inline void score(const Unit& unit, const Segment& segment, const Group<N>& group) {
  constexpr int FEW = kColumns > 1 ? kColumns / 2 : 1;
  const int last = (group.last + kLanes - 1) / kLanes;
  for (int block = group.first / kLanes / kColumns * kColumns; block < last;) {
    if (last - block > FEW) {
      score_blocks<E, N, kColumns>(unit, segment, group.vector, block);
      block += kColumns;
    } else {
      score_blocks<E, N, FEW>(unit, segment, group.vector, block);
      block += FEW;
    }
  }
}

// Scores outside a vector's [from, to) become -infinity, in the blocks that hold keys any sees.
inline void hide(float* p, int first_block, int last_block, int from, int to) {
  for (int b = first_block; b < last_block; ++b) {
    const int first = from - b * kLanes, last = to - b * kLanes;
    if (first <= 0 && last >= kLanes) continue;
    const bool none = last <= 0 || first >= kLanes || from >= to;
    const F s = none ? F::set(-std::numeric_limits<float>::infinity())
                     : keep_lanes(F::load(p + b * kLanes), first > 0 ? first : 0,
                                  last < kLanes ? last : kLanes);
    s.store(p + b * kLanes);
  }
}

// Turns the group's scores into probabilities against each vector's largest, m; l are their sums.
// The scale of an int8 value is multiplied into its probability.
template <KvElement E, int N>
inline void soften(const Unit& unit, const Segment& segment, const Group<N>& group, float* m,
                   float* l) {
  const int first = group.first / kLanes, last = (group.last + kLanes - 1) / kLanes;
  const int all_first = (group.all_first + kLanes - 1) / kLanes, all_last = group.all_last / kLanes;
  const bool some = all_first < all_last;  // blocks of which all see every key
  F best[N], sum[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    float* p = unit.p + i * kSegmentKeys;
    hide(p, first, some ? all_first : last, group.from[i], group.to[i]);
    if (some) hide(p, all_last, last, group.from[i], group.to[i]);
    best[i] = F::set(-std::numeric_limits<float>::infinity());
    sum[i] = F::set(0.0f);
  }
  for (int b = first; b < last; ++b) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      best[i] = max(F::load(unit.p + i * kSegmentKeys + b * kLanes), best[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    m[i] = reduce_max(best[i]);
    best[i] = F::set(m[i]);
  }
  for (int b = first; b < last; ++b) {
    F scale = F::set(1.0f);
    if (E == KvElement::int8) scale = F::load(unit.args.kv->scales(segment.keys(b)) + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      float* place = unit.p + i * kSegmentKeys + b * kLanes;
      const F e = exp2_16(F::load(place) - best[i]);
      (E == KvElement::int8 ? e * scale : e).store(place);
      sum[i] = sum[i] + e;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) l[i] = reduce_add(sum[i]);
}

// One key's value, COLUMNS vectors from dimension d: sums[i] += p[i][key] v[key].
template <KvElement E, int N, int COLUMNS, bool ALL>
inline void gather_key(const Unit& unit, const Group<N>& group, const uint8_t* v, int key,
                       F (&sums)[N][COLUMNS]) {
  F row[COLUMNS];
#pragma GCC unroll 8
  for (int c = 0; c < COLUMNS; ++c) row[c] = load_kv<E>(v, c * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    if (!ALL && (key < group.from[i] || key >= group.to[i])) continue;
    const F weight = F::set(unit.p[i * kSegmentKeys + key]);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[i][c] = fma(weight, row[c], sums[i][c]);
  }
}

// The group's outputs of a segment in COLUMNS vectors from dimension d, key by key in order: merged
// into the totals (old total times `keep`, new part times `take`), or written to the partials.
template <KvElement E, int N, int COLUMNS>
inline void gather(const Unit& unit, const Segment& segment, const Group<N>& group, int d,
                   const float* keep, const float* take) {
  constexpr size_t BYTES = get_bytes(E);
  const size_t dim = unit.head_dim;
  F sums[N][COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[i][c] = F::set(0.0f);
  }
  for (int key = group.first; key < group.last;) {
    const int block = key / kLanes;
    const size_t at = (key % kLanes * dim + d) * BYTES;
    const uint8_t* v = segment.values(block) + at;
    const uint8_t* ahead = segment.stream[segment.blocks + block + kAheadBlocks] + at;
    int stop = (block + 1) * kLanes < group.last ? (block + 1) * kLanes : group.last;
    const bool all = key >= group.all_first && key < group.all_last;
    if (all) {
      stop = stop < group.all_last ? stop : group.all_last;
      for (; key < stop; ++key, v += dim * BYTES, ahead += dim * BYTES) {
        prefetch<COLUMNS * kLanes * BYTES>(ahead);
        gather_key<E, N, COLUMNS, true>(unit, group, v, key, sums);
      }
      continue;
    }
    if (key < group.all_first && group.all_first < stop) stop = group.all_first;
    for (; key < stop; ++key, v += dim * BYTES) {
      gather_key<E, N, COLUMNS, false>(unit, group, v, key, sums);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    float* out = unit.partial == nullptr
                     ? unit.total_o + (group.vector + i) * dim + d
                     : unit.partial + (group.vector + i) * partial_floats(dim) + d;
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c, out += kLanes) {
      if (unit.partial == nullptr) {
        fma(F::load(out), F::set(keep[i]), sums[i][c] * F::set(take[i])).store(out);
      } else {
        sums[i][c].store(out);
      }
    }
  }
}

// Merges N new (m, l) into the running ones; keep and take are the factors of their outputs. The
// arrays are readable for kLanes; a state that has seen no key has m = -infinity, l = 0.
inline void merge_sums(const float* m, const float* l, int n, float* total_m, float* total_l,
                       float* keep, float* take) {
  const F old = F::load(total_m), part = F::load(m), now = max(old, part);
  const F a = exp2_16(old - now), b = exp2_16(part - now);
  alignas(64) float sums[kLanes], tops[kLanes];
  fma(F::load(total_l), a, F::load(l) * b).store(sums);
  now.store(tops);
  a.store(keep);
  b.store(take);
  for (int i = 0; i < n; ++i) {
    total_m[i] = tops[i];
    total_l[i] = sums[i];
  }
}

template <KvElement E, int N>
inline void visit(const Unit& unit, const Segment& segment, int vector) {
  const Group<N> group(unit, segment, vector);
  alignas(64) float m[kLanes] = {}, l[kLanes] = {}, keep[kLanes], take[kLanes];
  score<E, N>(unit, segment, group);
  soften<E, N>(unit, segment, group, m, l);
  if (unit.partial == nullptr) {
    merge_sums(m, l, N, unit.total_m + vector, unit.total_l + vector, keep, take);
  } else {
    for (int i = 0; i < N; ++i) {
      float* out = unit.partial + (vector + i) * partial_floats(unit.head_dim);
      out[unit.head_dim] = m[i];
      out[unit.head_dim + 1] = l[i];
    }
  }
  int d = 0;
  for (; d + kColumns * kLanes <= unit.head_dim; d += kColumns * kLanes) {
    gather<E, N, kColumns>(unit, segment, group, d, keep, take);
  }
  for (; d < unit.head_dim; d += kLanes) gather<E, N, 1>(unit, segment, group, d, keep, take);
}

// All vectors in groups of at most kTogether, as even as they can be.
template <KvElement E>
inline void visit_segment(const Unit& unit, const Segment& segment) {
  for (int v = 0; v < unit.vectors;) {
    const int left = unit.vectors - v, groups = (left + kTogether - 1) / kTogether;
    const int n = (left + groups - 1) / groups;
    switch (n) {
      case 6: visit<E, 6>(unit, segment, v); break;
      case 5: visit<E, 5>(unit, segment, v); break;
      case 4: visit<E, 4>(unit, segment, v); break;
      case 3: visit<E, 3>(unit, segment, v); break;
      case 2: visit<E, 2>(unit, segment, v); break;
      default: visit<E, 1>(unit, segment, v);
    }
    v += n;
  }
}

inline void write_normalised(const float* o, float l, int head_dim, float* y) {
  const F inverse = F::set(1.0f / l);
  for (int d = 0; d < head_dim; d += kLanes) (F::load(o + d) * inverse).store(y + d);
}

inline void attention(const AttentionArgs& args) {
  Unit unit(args);
  const size_t dim = unit.head_dim;
  const bool rotated = args.kv->element == KvElement::int8;  // then keys are H k
  const F scale = F::set(args.scale * 1.44269504088896341f / (rotated ? rotated_dims(dim) : 1));
  for (int v = 0; v < unit.vectors; ++v) {
    const float* source = args.q + v / args.group * args.stride + v % args.group * dim;
    for (size_t d = 0; d < dim; d += kLanes) {
      (F::load(source + d) * scale).store(unit.q + v * dim + d);
      F::set(0.0f).store(unit.total_o + v * dim + d);
    }
    if (rotated) rotate(unit.q + v * dim, unit.head_dim);
    unit.total_m[v] = -std::numeric_limits<float>::infinity();
    unit.total_l[v] = 0.0f;
  }
  for (int s = args.first_segment; s < args.last_segment; ++s) {
    const Segment segment(unit, s);
    switch (args.kv->element) {
      case KvElement::f32: visit_segment<KvElement::f32>(unit, segment); break;
      case KvElement::f16: visit_segment<KvElement::f16>(unit, segment); break;
      case KvElement::int8: visit_segment<KvElement::int8>(unit, segment); break;
    }
    if (unit.partial != nullptr) unit.partial += args.partial_stride;
  }
  if (args.partial != nullptr) return;
  for (int v = 0; v < unit.vectors; ++v) {
    write_normalised(unit.total_o + v * dim, unit.total_l[v], unit.head_dim,
                     args.y + v / args.group * args.stride + v % args.group * dim);
  }
}

// Merges one vector's segments, in order, into y: the same sums as `attention` makes over them.
inline void merge(const float* partials, size_t stride, int segments, int head_dim, float* y) {
  alignas(64) float total_m[kLanes], total_l[kLanes] = {}, m[kLanes] = {}, l[kLanes] = {};
  alignas(64) float keep[kLanes], take[kLanes];
  F::set(-std::numeric_limits<float>::infinity()).store(total_m);
  for (int d = 0; d < head_dim; d += kLanes) F::set(0.0f).store(y + d);
  for (int s = 0; s < segments; ++s) {
    const float* part = partials + s * stride;
    m[0] = part[head_dim];
    l[0] = part[head_dim + 1];
    merge_sums(m, l, 1, total_m, total_l, keep, take);
    const F a = F::set(keep[0]), b = F::set(take[0]);
    for (int d = 0; d < head_dim; d += kLanes) {
      fma(F::load(y + d), a, F::load(part + d) * b).store(y + d);
    }
  }
  write_normalised(y, total_l[0], head_dim, y);
}

}  // namespace twostroke::TS_ISA
