#include "schedule.h"

#include <algorithm>

namespace twostroke {
namespace {

constexpr int kSegmentBlocks = kSegmentKeys / kLanes;

struct Cell {
  AttentionUnit whole;
  int first_block, last_block;

  // Blocks that the segments first <= s < last hold for it.
  int count_blocks(int first, int last) const {
    return std::min(last * kSegmentBlocks, last_block) -
           std::max(first * kSegmentBlocks, first_block);
  }
  int segments() const { return whole.last_segment - whole.first_segment; }
  // Reading a block costs about what four tokens' arithmetic on it does.
  int64_t cost() const {
    return static_cast<int64_t>(count_blocks(whole.first_segment, whole.last_segment)) *
           (4 + whole.tokens);
  }
};

// All cells, a row's last and longest first.
std::vector<Cell> find_cells(const StepView& step, int window, int kv_heads) {
  std::vector<Cell> cells;
  for (int r = 0; r + 1 < static_cast<int>(step.row_offsets.size()); ++r) {
    const int begin = step.row_offsets[r], end = step.row_offsets[r + 1];
    for (int t = begin + (end - begin - 1) / kQueryTile * kQueryTile; t >= begin; t -= kQueryTile) {
      const int tokens = std::min(kQueryTile, end - t), position = step.positions[t];
      const int first = get_first_block(position, window);
      const int last = (position + tokens - 1) / kLanes + 1;
      for (int head = 0; head < kv_heads; ++head) {
        cells.push_back({{r, t, tokens, head, first / kSegmentBlocks,
                          (last - 1) / kSegmentBlocks + 1, -1},
                         first, last});
      }
    }
  }
  return cells;
}

// Adds the cell cut before each of these segments, which ascend. Returns nothing new for none.
void add_units(const Cell& cell, const std::vector<int>& cuts, Schedule& schedule) {
  AttentionUnit unit = cell.whole;
  if (!cuts.empty()) {
    schedule.merges.push_back(
        {unit.first_token, unit.tokens, unit.kv_head, schedule.partials, cell.segments()});
  }
  for (size_t i = 0; i <= cuts.size(); ++i) {
    unit.last_segment = i < cuts.size() ? cuts[i] : cell.whole.last_segment;
    if (!cuts.empty()) {
      unit.partial = schedule.partials;
      schedule.partials += (unit.last_segment - unit.first_segment) * unit.tokens;
    }
    if (i > 0) schedule.pieces.push_back(static_cast<int>(schedule.units.size()));
    schedule.units.push_back(unit);
    unit.first_segment = unit.last_segment;
  }
}

// One piece a thread, cut between segments where it holds its share of the blocks.
void add_streams(const std::vector<Cell>& cells, int threads, Schedule& schedule) {
  int64_t total = 0, before = 0;
  for (const Cell& cell : cells) {
    total += cell.count_blocks(cell.whole.first_segment, cell.whole.last_segment);
  }
  int thread = 1;
  for (const Cell& cell : cells) {
    std::vector<int> cuts;
    for (int s = cell.whole.first_segment; s < cell.whole.last_segment; ++s) {
      const int blocks = cell.count_blocks(s, s + 1);
      if (thread < threads && (2 * before + blocks) * threads >= 2 * total * thread) {
        ++thread;
        if (s > cell.whole.first_segment) {
          cuts.push_back(s);
        } else if (!schedule.units.empty()) {
          schedule.pieces.push_back(static_cast<int>(schedule.units.size()));
        }
      }
      before += blocks;
    }
    add_units(cell, cuts, schedule);
  }
}

// A piece a cell; a cell that holds much of the step's work is divided.
void add_cells(const std::vector<Cell>& cells, int threads, Schedule& schedule) {
  int64_t total = 0;
  for (const Cell& cell : cells) total += cell.cost();
  const int64_t most = total / (4 * threads) + 1;
  for (const Cell& cell : cells) {
    const int parts = static_cast<int>(std::min<int64_t>(
        {cell.segments(), threads, (cell.cost() + most - 1) / most}));
    std::vector<int> cuts;
    for (int i = 1; i < parts; ++i) {
      cuts.push_back(cell.whole.first_segment + cell.segments() * i / parts);
    }
    if (!schedule.units.empty()) {
      schedule.pieces.push_back(static_cast<int>(schedule.units.size()));
    }
    add_units(cell, cuts, schedule);
  }
}

}  // namespace

void build_schedule(const StepView& step, int window, int kv_heads, int threads,
                    Schedule& schedule) {
  schedule.units.clear();
  schedule.merges.clear();
  schedule.pieces.assign(1, 0);
  schedule.partials = 0;
  const std::vector<Cell> cells = find_cells(step, window, kv_heads);
  if (step.tokens.size() + 1 == step.row_offsets.size()) {
    add_streams(cells, threads, schedule);
  } else {
    add_cells(cells, threads, schedule);
  }
  schedule.pieces.push_back(static_cast<int>(schedule.units.size()));
}

}  // namespace twostroke
