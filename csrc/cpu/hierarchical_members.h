// The classes below the topmost nodes of a batch's targets in memory order, found once for many rows.
#pragma once

#include <string.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace longtail {

class MembersOfNodes {
 public:
  // Of the tables in args; fills in what args say of members.
  void find(HierarchicalLossArgs& args) {
    args.mask_bytes = (args.num_classes + 63) / 64 * 8;
    find_nodes(args);
    int64_t total = 0;
    for (const Members& each : nodes_) total += each.count;
    offsets_.resize(total);
    const int64_t words = args.mask_bytes / 8, few = static_cast<int64_t>(nodes_.size());
    counts_.resize(few * (words + 1));
    const int64_t bytes = args.storage == Storage::float64 ? 8 : 4;
    if (args.class_bias) bias_.resize(total * bytes);
    bits_.assign(few * words, 0);
    int64_t first = 0;
    for (int64_t i = 0; i < few; ++i) {
      nodes_[i].bits = bits_.data() + i * words;
      nodes_[i].counts = counts_.data() + i * (words + 1);
      nodes_[i].offsets = offsets_.data() + first;
      nodes_[i].bias = args.class_bias ? bias_.data() + first * bytes : nullptr;
      first += nodes_[i].count;
    }
    torch::stable::parallel_for(0, few, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill(args, i);
    });
    args.members = nodes_.data();
    args.members_count = few;
  }

 private:
  // Those of fewer classes are looked up anew by each row, so that all masks together are 32 bytes a class at most.
  static constexpr int64_t kLargeShare = 256;

  void find_nodes(const HierarchicalLossArgs& args) {
    for (int64_t i = 0; i < args.rows; ++i) {
      const int64_t g = args.target[i * args.target_stride];
      if (g == args.ignore_index || g < 0 || g >= args.tree_classes) continue;
      const int32_t node = args.path[g * args.depth];
      if (node < 0 || node >= args.nodes) continue;
      const int64_t begin = args.node_begin[node], end = args.node_end[node];
      if (begin < 0 || end > args.num_classes || (end - begin) * kLargeShare <= args.num_classes) continue;
      const auto place = std::lower_bound(nodes_.begin(), nodes_.end(), node);
      if (place == nodes_.end() || place->node != node)
        nodes_.insert(place, {node, end - begin, nullptr, nullptr, nullptr, nullptr});
    }
  }

  // By way of the bits, which sort the classes.
  void fill(const HierarchicalLossArgs& args, int64_t i) {
    const Members& node = nodes_[i];
    const int64_t words = args.mask_bytes / 8, first = args.node_begin[node.node];
    uint64_t* bits = bits_.data() + i * words;
    for (int64_t p = first; p < first + node.count; ++p) bits[args.order[p] / 64] |= uint64_t(1) << args.order[p] % 64;
    int32_t* counts = counts_.data() + i * (words + 1);
    const int64_t start = node.offsets - offsets_.data();
    int64_t k = start;
    for (int64_t word = 0; word < words; ++word) {
      counts[word] = static_cast<int32_t>(k - start);
      for (uint64_t left = bits[word]; left != 0 && k < start + node.count; left &= left - 1, ++k) {
        const int64_t j = word * 64 + __builtin_ctzll(left);
        offsets_[k] = static_cast<uint16_t>(j % Members::kBlock);
        if (args.class_bias) copy_bias(args, j, k);
      }
    }
    counts[words] = static_cast<int32_t>(k - start);
  }

  void copy_bias(const HierarchicalLossArgs& args, int64_t j, int64_t k) {
    const int64_t bytes = args.storage == Storage::float64 ? 8 : 4;
    memcpy(bias_.data() + k * bytes, static_cast<const char*>(args.class_bias) + j * bytes, bytes);
  }

  std::vector<Members> nodes_;
  std::vector<char> bias_;
  std::vector<uint64_t> bits_;
  std::vector<int32_t> counts_;
  std::vector<uint16_t> offsets_;
};

}  // namespace longtail
