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
    classes_.resize(total);
    places_.resize(total);
    const int64_t bytes = args.storage == Storage::float64 ? 8 : 4;
    if (args.class_bias) bias_.resize(total * bytes);
    bits_.assign(nodes_.size() * args.mask_bytes, 0);
    int64_t first = 0;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      nodes_[i].bits = bits_.data() + i * args.mask_bytes;
      nodes_[i].classes = classes_.data() + first;
      nodes_[i].places = places_.data() + first;
      nodes_[i].bias = args.class_bias ? bias_.data() + first * bytes : nullptr;
      first += nodes_[i].count;
    }
    torch::stable::parallel_for(0, static_cast<int64_t>(nodes_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill(args, nodes_[i]);
    });
    args.members = nodes_.data();
    args.members_count = static_cast<int64_t>(nodes_.size());
  }

 private:
  // Those of fewer classes are looked up anew by each row, so that all masks together are 32 bytes a class at most.
  static constexpr int64_t kLargeShare = 256;

  void find_nodes(const HierarchicalLossArgs& args) {
    for (int64_t i = 0; i < args.rows; ++i) {
      const int64_t g = args.target[i * args.target_stride];
      if (g == args.ignore_index || g < 0 || g >= args.num_classes) continue;
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
  void fill(const HierarchicalLossArgs& args, const Members& node) {
    const int64_t first = args.node_begin[node.node];
    uint8_t* bits = bits_.data() + (node.bits - bits_.data());
    for (int64_t p = first; p < first + node.count; ++p) {
      bits[args.order[p] / 8] |= static_cast<uint8_t>(1 << args.order[p] % 8);
    }
    int64_t k = node.classes - classes_.data();
    for (int64_t byte = 0; byte < args.mask_bytes; ++byte) {
      for (unsigned left = bits[byte]; left != 0; left &= left - 1) {
        const int64_t j = byte * 8 + __builtin_ctz(left);
        classes_[k] = static_cast<int32_t>(j);
        places_[k] = static_cast<int32_t>(args.position[j] - first);
        if (args.class_bias) copy_bias(args, j, k);
        ++k;
      }
    }
  }

  void copy_bias(const HierarchicalLossArgs& args, int64_t j, int64_t k) {
    const int64_t bytes = args.storage == Storage::float64 ? 8 : 4;
    memcpy(bias_.data() + k * bytes, static_cast<const char*>(args.class_bias) + j * bytes, bytes);
  }

  std::vector<Members> nodes_;
  std::vector<char> bias_;
  std::vector<uint8_t> bits_;
  std::vector<int32_t> classes_, places_;
};

}  // namespace longtail
