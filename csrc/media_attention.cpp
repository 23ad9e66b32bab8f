// The schedule of media_attention on a CPU: tiles of query rows by keys, of which only those are visited that hold a visible
// pair, and of these only the rows that see one. Equations: vlmfast/ops/media_attention.py.
#include "cpu/media_attention.h"

#include <ATen/Functions.h>

#include <limits>
#include <vector>

#include "ops.h"
#include "tiles.h"

namespace vlmfast {
namespace {

constexpr int64_t kQueries = 128, kKeys = 64;
constexpr int64_t kRowStep = 16;  // products take this many rows or a multiple: each number of rows costs oneDNN a kernel
constexpr int64_t kFewRows = 4;   // up to here, transposing a tile of keys costs more than it saves
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const cpu::MediaAttentionKernels& kernels() { return VLMFAST_KERNELS(media_attention); }

// Rows of a tensor in float32.
struct Rows {
  const float* data;
  int64_t stride;
};

// (B, H, L, d) of any dtype and strides; float32 is read in place, 16 bits are widened a tile at a time.
struct Heads {
  explicit Heads(const at::Tensor& t) : tensor(t.stride(3) == 1 ? t : t.contiguous()), dim(t.size(3)) {}

  Rows rows(int64_t b, int64_t h, int64_t first, int64_t count, std::vector<float>& scratch) const {
    const int64_t size = tensor.element_size(), stride = tensor.stride(2);
    const char* data = static_cast<const char*>(tensor.const_data_ptr()) +
                       size * (b * tensor.stride(0) + h * tensor.stride(1) + first * stride);
    if (size == 4) return {reinterpret_cast<const float*>(data), stride};
    scratch.resize(count * dim);
    VLMFAST_KERNELS(tile).widen(reinterpret_cast<const uint16_t*>(data), stride, tensor.scalar_type() == at::kBFloat16, count,
                                dim, scratch.data(), dim);
    return {scratch.data(), dim};
  }

  at::Tensor tensor;
  int64_t dim;
};

// Fresh (B, H, L, d) whose heads lie side by side in memory, written in tiles of float32.
struct Result {
  Result(const at::Tensor& like, int64_t dim)
      : tensor(at::empty({like.size(0), like.size(2), like.size(1), dim}, like.options()).transpose(1, 2)) {}

  void write(int64_t b, int64_t h, int64_t first, int64_t count, const float* rows) {
    const int64_t dim = tensor.size(3), stride = tensor.stride(2);
    char* data = static_cast<char*>(tensor.mutable_data_ptr()) +
                 tensor.element_size() * (b * tensor.stride(0) + h * tensor.stride(1) + first * stride);
    if (tensor.element_size() == 4)
      for (int64_t i = 0; i < count; ++i) std::copy_n(rows + i * dim, dim, reinterpret_cast<float*>(data) + i * stride);
    else
      VLMFAST_KERNELS(tile).narrow(rows, dim, tensor.scalar_type() == at::kBFloat16, count, dim,
                                   reinterpret_cast<uint16_t*>(data), stride);
  }

  at::Tensor tensor;
};

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The keys that each query row sees: media intervals become intervals of keys, lengths become biases of -inf.
class Visibility {
 public:
  Visibility(const at::Tensor& q, const at::Tensor& k, const Media& given)
      : length_(q.size(2)),
        keys_(k.size(2)),
        query_tiles(ceil_div(length_, kQueries)),
        key_tiles(ceil_div(keys_, kKeys)),
        first_(q.size(0) * length_),
        last_(first_.size()),
        all_bias_(q.size(0) * keys_) {
    const auto& [media_lo, media_hi, media_len, key_bias, tokens_per_media, _, empty_all] = given;
    const int64_t batch = q.size(0), media = keys_ / tokens_per_media;
    const auto values = [](const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<int32_t>() : nullptr; };
    const int32_t *lo = values(media_lo), *hi = values(media_hi), *len = values(media_len);
    if (key_bias) std::copy_n(key_bias->const_data_ptr<float>(), batch * keys_, all_bias_.begin());
    bias_ = all_bias_;
    if (empty_all) everything_.assign(first_.size(), 0);
    alive_.assign(batch * key_tiles, 0);
    summary_.assign(batch * query_tiles, {keys_, 0});
    std::vector<int64_t> used(media + 1);  // media with keys among the first t
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < media; ++t) {
        const int64_t valid = len ? std::clamp<int64_t>(len[b * media + t], 0, tokens_per_media) : tokens_per_media;
        used[t + 1] = used[t] + (valid > 0);
        const int64_t begin = t * tokens_per_media, end = begin + tokens_per_media;
        std::fill(bias_.begin() + b * keys_ + begin + valid, bias_.begin() + b * keys_ + end, -kInfinity);
        for (int64_t tile = begin / kKeys; valid > 0 && tile <= (begin + valid - 1) / kKeys; ++tile)
          alive_[b * key_tiles + tile] = 1;
      }
      for (int64_t i = 0; i < length_; ++i) {
        const int64_t at = b * length_ + i;
        int64_t begin = lo ? std::clamp<int64_t>(lo[at], 1, media + 1) - 1 : 0;
        int64_t end = hi ? std::clamp<int64_t>(hi[at], 0, media) : media;
        if (begin >= end || used[begin] == used[end]) {
          begin = end = 0;
          if (empty_all) {
            end = media;
            everything_[at] = 1;
            std::fill_n(alive_.begin() + b * key_tiles, key_tiles, 1);
          }
        }
        first_[at] = int32_t(begin * tokens_per_media);
        last_[at] = int32_t(end * tokens_per_media);
        pairs_ += last_[at] - first_[at];
        if (begin == end) continue;
        Range& seen = summary_[b * query_tiles + i / kQueries];
        seen = {std::min<int64_t>(seen.begin, first_[at]), std::max<int64_t>(seen.end, last_[at])};
      }
    }
  }

  int64_t queries(int64_t tile) const { return std::min(kQueries, length_ - tile * kQueries); }
  int64_t keys(int64_t tile) const { return std::min(kKeys, keys_ - tile * kKeys); }

  // The key tiles that may hold a key that the tile of queries sees.
  Range key_tiles_of(int64_t b, int64_t query_tile) const {
    const Range seen = summary_[b * query_tiles + query_tile];
    return seen.empty() ? Range{0, 0} : Range{seen.begin / kKeys, ceil_div(seen.end, kKeys)};
  }

  // The rows, counted from the first of the tile of queries, between which all lie that see a key of the other tile.
  Range rows(int64_t b, int64_t query_tile, int64_t key_tile) const {
    const Range seen = summary_[b * query_tiles + query_tile];
    const int64_t k0 = key_tile * kKeys, k1 = k0 + keys(key_tile), count = queries(query_tile);
    if (!alive_[b * key_tiles + key_tile] || seen.begin >= k1 || seen.end <= k0) return {0, 0};
    const int32_t *first = first_.data() + b * length_ + query_tile * kQueries, *last = last_.data() + (first - first_.data());
    const auto sees = [&](int64_t i) { return first[i] < k1 && last[i] > k0 && first[i] < last[i]; };
    int64_t begin = 0, end = count;
    while (begin < end && !sees(begin)) ++begin;
    while (begin < end && !sees(end - 1)) --end;
    if (begin == end) return {0, 0};
    return {begin / kRowStep * kRowStep, std::min(ceil_div(end, kRowStep) * kRowStep, count)};
  }

  cpu::VisibleKeys visible(int64_t b, int64_t first_row, int64_t key_tile) const {
    const int64_t at = b * length_ + first_row, k0 = key_tile * kKeys;
    return {first_.data() + at, last_.data() + at, everything_.empty() ? nullptr : everything_.data() + at,
            bias_.data() + b * keys_ + k0, all_bias_.data() + b * keys_ + k0, k0};
  }

  // How many of `items` equal parts of the work are worth a thread's while.
  int64_t grain(int64_t items, int64_t heads, int64_t dims) const {
    constexpr int64_t worthwhile = 1 << 20;  // floating-point operations
    return std::max<int64_t>(1, worthwhile * items / std::max<int64_t>(1, 2 * pairs_ * heads * dims));
  }

 private:
  int64_t length_, keys_;

 public:
  int64_t query_tiles, key_tiles;

 private:
  std::vector<int32_t> first_, last_;
  std::vector<uint8_t> everything_, alive_;
  std::vector<float> all_bias_, bias_;
  std::vector<Range> summary_;
  int64_t pairs_ = 0;
};

// A thread's tiles.
struct Scratch {
  std::vector<float> q, k, v, grad, k_columns, v_columns, sums, v_sums;
  std::vector<float> tile = std::vector<float>(kQueries * kKeys), d_tile = tile;
  float top[kQueries], sum[kQueries], lse[kQueries];
};

const float* columns(const Rows& rows, int64_t count, int64_t dim, std::vector<float>& out) {
  out.resize(dim * kKeys);
  VLMFAST_KERNELS(tile).transpose(rows.data, rows.stride, count, dim, out.data(), kKeys);
  return out.data();
}

// f(item, scratch) for every item, in parallel.
template <class F>
void for_each_item(int64_t items, int64_t grain, const F& f) {
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t item = begin; item < end; ++item) f(item, scratch);
    release_thread();
  });
}

// <grad_out_i, out_i> of every row, (B, H, Lq).
at::Tensor row_products(const Heads& grad_out, const Heads& out, const at::Tensor& lse, const Visibility& visibility) {
  const int64_t heads = lse.size(1), length = lse.size(2), tiles = visibility.query_tiles;
  auto delta = at::empty_like(lse);
  for_each_item(lse.size(0) * heads * tiles, 8, [&](int64_t item, Scratch& scratch) {
    const int64_t b = item / tiles / heads, h = item / tiles % heads, i0 = item % tiles * kQueries;
    const int64_t count = visibility.queries(item % tiles);
    const Rows grad = grad_out.rows(b, h, i0, count, scratch.grad), value = out.rows(b, h, i0, count, scratch.v);
    float* target = delta.mutable_data_ptr<float>() + (b * heads + h) * length + i0;
    for (int64_t i = 0; i < count; ++i)
      target[i] = float(VLMFAST_KERNELS(tile).dot(grad.data + i * grad.stride, value.data + i * value.stride, out.dim));
  });
  return delta;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> media_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                           const Media& media) {
  const Visibility visibility(q, k, media);
  const Heads queries(q), keys(k), values(v);
  const int64_t heads = q.size(1), group = heads / k.size(1), length = q.size(2), tiles = visibility.query_tiles;
  const int64_t dim = queries.dim, v_dim = values.dim, items = q.size(0) * heads * tiles;
  Result out(q, v_dim);
  auto lse = at::empty({q.size(0), heads, length}, q.options().dtype(at::kFloat));

  for_each_item(items, visibility.grain(items, heads, dim + v_dim), [&](int64_t item, Scratch& scratch) {
    const int64_t b = item / tiles / heads, h = item / tiles % heads, query_tile = item % tiles;
    const int64_t i0 = query_tile * kQueries, count = visibility.queries(query_tile);
    const Rows query = queries.rows(b, h, i0, count, scratch.q);
    std::fill_n(scratch.top, count, -kInfinity);
    std::fill_n(scratch.sum, count, 0.0f);
    scratch.sums.assign(count * v_dim, 0.0f);
    const Range range = visibility.key_tiles_of(b, query_tile);
    for (int64_t j = range.begin; j < range.end; ++j) {
      const Range rows = visibility.rows(b, query_tile, j);
      if (rows.empty()) continue;
      const int64_t height = rows.end - rows.begin, width = visibility.keys(j);
      const Rows key = keys.rows(b, h / group, j * kKeys, width, scratch.k);
      const Rows value = values.rows(b, h / group, j * kKeys, width, scratch.v);
      const float* first_query = query.data + rows.begin * query.stride;
      float *tile = scratch.tile.data(), *sums = scratch.sums.data() + rows.begin * v_dim;
      const bool few = height <= kFewRows;
      if (few)
        for (int64_t i = 0; i < height; ++i)
          kernels().row_scores(first_query + i * query.stride, key.data, key.stride, width, dim, tile + i * kKeys);
      else
        tile_gemm(height, width, dim, first_query, query.stride, columns(key, width, dim, scratch.k_columns), kKeys, tile,
                  kKeys, false);
      kernels().softmax_step(tile, kKeys, height, width, visibility.visible(b, i0 + rows.begin, j), float(media.scale),
                             scratch.top + rows.begin, scratch.sum + rows.begin, sums, v_dim, v_dim);
      if (few)
        for (int64_t i = 0; i < height; ++i)
          kernels().add_row_values(tile + i * kKeys, value.data, value.stride, width, v_dim, sums + i * v_dim);
      else
        tile_gemm(height, v_dim, width, tile, kKeys, value.data, value.stride, sums, v_dim, true);
    }
    kernels().finish(count, scratch.top, scratch.sum, scratch.sums.data(), v_dim, v_dim,
                     lse.mutable_data_ptr<float>() + (b * heads + h) * length + i0);
    out.write(b, h, i0, count, scratch.sums.data());
  });
  return {out.tensor, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> media_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const Media& media, bool q_grad, bool kv_grad) {
  const Visibility visibility(q, k, media);
  const Heads gradients(grad_out), queries(q), keys(k), values(v);
  const int64_t batch = q.size(0), heads = q.size(1), kv_heads = k.size(1), group = heads / kv_heads, length = q.size(2);
  const int64_t dim = queries.dim, v_dim = values.dim;
  const auto delta = row_products(gradients, Heads(out), lse, visibility);

  // Probabilities into scratch.tile and gradients of the scores into scratch.d_tile, for the given rows of a tile; the
  // columns of keys and values are in scratch.
  const auto tile_gradient = [&](int64_t b, int64_t h, int64_t i0, Range rows, int64_t j, const Rows& query,
                                 const Rows& grad, Scratch& scratch) {
    const int64_t height = rows.end - rows.begin, width = visibility.keys(j), row = (b * heads + h) * length + i0 + rows.begin;
    tile_gemm(height, width, dim, query.data, query.stride, scratch.k_columns.data(), kKeys, scratch.tile.data(), kKeys, false);
    tile_gemm(height, width, v_dim, grad.data, grad.stride, scratch.v_columns.data(), kKeys, scratch.d_tile.data(), kKeys,
              false);
    kernels().gradient(scratch.tile.data(), scratch.d_tile.data(), kKeys, height, width,
                       visibility.visible(b, i0 + rows.begin, j), float(media.scale), lse.const_data_ptr<float>() + row,
                       delta.const_data_ptr<float>() + row);
  };

  at::Tensor dq = at::empty({0}, q.options()), dk = at::empty({0}, k.options()), dv = at::empty({0}, v.options());
  if (q_grad) {
    Result result(q, dim);
    const int64_t tiles = visibility.query_tiles, items = batch * heads * tiles;
    for_each_item(items, visibility.grain(items, heads, 2 * dim + v_dim), [&](int64_t item, Scratch& scratch) {
      const int64_t b = item / tiles / heads, h = item / tiles % heads, query_tile = item % tiles;
      const int64_t i0 = query_tile * kQueries, count = visibility.queries(query_tile);
      const Rows query = queries.rows(b, h, i0, count, scratch.q), grad = gradients.rows(b, h, i0, count, scratch.grad);
      scratch.sums.assign(count * dim, 0.0f);
      const Range range = visibility.key_tiles_of(b, query_tile);
      for (int64_t j = range.begin; j < range.end; ++j) {
        const Range rows = visibility.rows(b, query_tile, j);
        if (rows.empty()) continue;
        const int64_t width = visibility.keys(j);
        const Rows key = keys.rows(b, h / group, j * kKeys, width, scratch.k);
        const Rows value = values.rows(b, h / group, j * kKeys, width, scratch.v);
        columns(key, width, dim, scratch.k_columns);
        columns(value, width, v_dim, scratch.v_columns);
        tile_gradient(b, h, i0, rows, j, {query.data + rows.begin * query.stride, query.stride},
                      {grad.data + rows.begin * grad.stride, grad.stride}, scratch);
        tile_gemm(rows.end - rows.begin, dim, width, scratch.d_tile.data(), kKeys, key.data, key.stride,
                  scratch.sums.data() + rows.begin * dim, dim, true);
      }
      result.write(b, h, i0, count, scratch.sums.data());
    });
    dq = result.tensor;
  }
  if (kv_grad) {
    Result k_result(k, dim), v_result(v, v_dim);
    const int64_t tiles = visibility.key_tiles, items = batch * kv_heads * tiles;
    for_each_item(items, visibility.grain(items, heads, 2 * (dim + v_dim)), [&](int64_t item, Scratch& scratch) {
      const int64_t b = item / tiles / kv_heads, kv_head = item / tiles % kv_heads, j = item % tiles;
      const int64_t width = visibility.keys(j);
      scratch.sums.assign(width * dim, 0.0f);
      scratch.v_sums.assign(width * v_dim, 0.0f);
      bool packed = false;
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
        for (int64_t query_tile = 0; query_tile < visibility.query_tiles; ++query_tile) {
          const Range rows = visibility.rows(b, query_tile, j);
          if (rows.empty()) continue;
          if (!packed) {
            columns(keys.rows(b, kv_head, j * kKeys, width, scratch.k), width, dim, scratch.k_columns);
            columns(values.rows(b, kv_head, j * kKeys, width, scratch.v), width, v_dim, scratch.v_columns);
            packed = true;
          }
          const int64_t i0 = query_tile * kQueries, height = rows.end - rows.begin;
          const Rows query = queries.rows(b, h, i0 + rows.begin, height, scratch.q);
          const Rows grad = gradients.rows(b, h, i0 + rows.begin, height, scratch.grad);
          tile_gradient(b, h, i0, rows, j, query, grad, scratch);
          transposed_gemm(width, v_dim, height, scratch.tile.data(), kKeys, grad.data, grad.stride,
                          scratch.v_sums.data(), v_dim, true);
          transposed_gemm(width, dim, height, scratch.d_tile.data(), kKeys, query.data, query.stride,
                          scratch.sums.data(), dim, true);
        }
      k_result.write(b, kv_head, j * kKeys, width, scratch.sums.data());
      v_result.write(b, kv_head, j * kKeys, width, scratch.v_sums.data());
    });
    dk = k_result.tensor;
    dv = v_result.tensor;
  }
  return {dq, dk, dv};
}

}  // namespace vlmfast
