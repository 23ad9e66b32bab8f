// Chunks of the logits between two sets of features, in memory: what the launchers of both losses take.
#pragma once

#include "types.h"

namespace vlmfast::cuda {

// Gradients of logits have entries of at most 1 and are stored times this in float16, away from its subnormals.
constexpr float kGradientScale = 16384.0f;

// Dot products of the rows first_row... of one side with the rows first_col... of the other, float32.
struct Logits {
  const float* dots;
  int64_t stride;  // from one row of dots to the next
  int64_t first_row, first_col, rows, cols;
  // Positives: column row + label_offset, or where codes are equal, unless they are null; of whole sides.
  const int32_t *row_codes, *col_codes;
  int64_t label_offset;
};

}  // namespace vlmfast::cuda
