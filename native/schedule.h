// How a step's attention is divided over threads. Pure bookkeeping: it computes no attention, and
// no division changes a bit of it (see attention.h).
//
// A tile of 16 query tokens of one row at one KV head is a cell. A unit is a cell or some of its
// key segments; what a divided cell's units write is merged afterwards. A piece is a run of units
// that one thread takes: where every row decodes, each thread gets one piece and reads one stream
// of memory; otherwise pieces are small, and a thread that is done takes the next.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels.h"

namespace twostroke {

struct StepView {  // borrowed arrays, as in kernels/ops.py: StepArrays
  std::span<const int32_t> tokens, positions, row_offsets, block_tables;
  int max_blocks;
};

struct AttentionUnit {
  int row, first_token, tokens, kv_head;
  int first_segment, last_segment;
  int partial;  // its first partial result, one a segment and token; < 0: it writes the output
};

struct AttentionMerge {
  int first_token, tokens, kv_head;
  int partial, segments;
};

struct Schedule {
  std::vector<AttentionUnit> units;
  std::vector<int> pieces;  // piece i is the units pieces[i] <= u < pieces[i + 1]
  std::vector<AttentionMerge> merges;
  int partials = 0;
};

// The schedule of a step for attention within `window` (0: none) over `threads` threads.
void build_schedule(const StepView& step, int window, int kv_heads, int threads,
                    Schedule& schedule);

// The first block that queries from `position` on see.
inline int get_first_block(int position, int window) {
  return window > 0 && position + 1 > window ? (position + 1 - window) / kLanes : 0;
}

}  // namespace twostroke
