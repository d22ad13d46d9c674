// What passes between the operators of hierarchical cross-entropy and their kernels: plain data, in the same shape on
// every device.
#pragma once

#include <stdint.h>

namespace longtail {

// The deepest tree that kernels know; deeper ones go to the reference.
constexpr int kDeepestTree = 8;

// A ring is a node on the path of a row's target without the node that follows on it; ring 0 is of the root. Classes of
// a node are side by side at the positions [node_begin, node_end).
//
// Of one shard of the classes, G of the tree and C of them here, positions count these alone. Where another shard has
// the target, the last node of its path is empty, u_g is -inf, and the loss means nothing. T: of the vectors, void
// where only `storage` says it.
template <typename Storage, typename T>
struct HierarchicalLossFields {
  Storage storage;
  int64_t rows, num_classes;  // N and C
  int64_t tree_classes;       // G
  int64_t pixels;             // 0: of [N, C]
  const void* logits;         // [N, C]
  int64_t logits_stride, logits_class_stride;
  const int64_t* target;  // [N], of G classes
  int64_t target_stride, ignore_index;
  int64_t nodes;                           // V, all but the root
  int depth;                               // L
  const int32_t* path;                     // [G, L], shorter paths padded by their last node
  const int32_t *node_begin, *node_end;    // [V]
  const T* node_weight;                    // [V]
  const int32_t *order, *position;         // [C], or null where each class is at its own position
  const T *weight, *class_bias;            // [G] and [C], or null
  const T* sample_weight;                  // [N], or null
  const T* grad_loss;                      // [N]; not read by Pass::loss
  int64_t grad_loss_stride;                // 0 when one value serves all rows
  T* loss;                                 // [N]; not written by Pass::backward
  T* stats;                                // [N, 2 L + 1]: m and d of each ring, u_g; read by Pass::backward
  void* grad;                              // [N, C]; may be `logits` itself; not written by Pass::loss
  int64_t grad_stride, grad_class_stride;  // the second is 1
};

}  // namespace longtail
