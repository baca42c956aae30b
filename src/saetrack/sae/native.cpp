// The inner loops of a sparse step on a CPU. Every output row is written by one thread, in an order that does not
// depend on the number of threads: equal inputs give equal bits. Plain C symbols, so that no header of PyTorch is needed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// Products of 8-bit numbers decide among latents where they are faster than those of bfloat16: with AMX they are not
// needed, without VNNI there are none.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__GNUC__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#define SAETRACK_INT8
#endif

namespace {

float dot(const float* a, const float* b, int64_t d) {
  float sums[64] = {};  // as many chains as hide the latency of an addition
  int64_t i = 0;
  for (; i + 64 <= d; i += 64)
    for (int64_t lane = 0; lane < 64; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  float sum = 0;
  for (; i < d; ++i) sum += a[i] * b[i];
  for (int64_t half = 32; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sum + sums[0];
}

void add(float weight, const float* row, float* sum, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) sum[i] += weight * row[i];
}

// Rows are read in no order that the hardware could guess.
void prefetch(const float* row, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(row + i);
}

template <typename Number>
struct Candidate {
  Number value;
  int32_t column;
};

template <typename Number>
bool larger(const Candidate<Number>& a, const Candidate<Number>& b) {
  return a.value != b.value ? a.value > b.value : a.column < b.column;
}

// The k best to the front, in no particular order.
template <typename Number>
void best_first(std::vector<Candidate<Number>>& found, int64_t k) {
  if (static_cast<int64_t>(found.size()) > k)
    std::nth_element(found.begin(), found.begin() + k - 1, found.end(), larger<Number>);
}

// The numbers of `row` that are no smaller than the threshold.
void at_least(const int16_t* row, int64_t d, int16_t threshold, std::vector<Candidate<int16_t>>& found) {
  int64_t j = 0;
#ifdef SAETRACK_INT8
  const __m512i bound = _mm512_set1_epi16(threshold);
  for (; j + 32 <= d; j += 32)
    for (uint32_t mask = _mm512_cmpge_epi16_mask(_mm512_loadu_si512(row + j), bound); mask; mask &= mask - 1) {
      const int64_t there = j + __builtin_ctz(mask);
      found.push_back({row[there], static_cast<int32_t>(there)});
    }
#endif
  for (; j < d; ++j)
    if (row[j] >= threshold) found.push_back({row[j], static_cast<int32_t>(j)});
}

struct Scratch {
  std::vector<int16_t> maxima, sorted;
  std::vector<Candidate<int16_t>> found;
};

// Leaves the k largest of `row` at the front of `found`. They lie in groups whose maximum is at least the k-th largest
// maximum, and few other numbers reach that. Group g is every `groups`-th number from g on, so that the maxima of all
// groups run along memory.
void largest_of_row(const int16_t* row, int64_t d, int64_t k, Scratch& scratch) {
  int64_t groups = 256;
  while (groups < 8 * k) groups *= 2;
  auto& found = scratch.found;
  found.clear();
  if (2 * groups > d) {
    for (int64_t j = 0; j < d; ++j) found.push_back({row[j], static_cast<int32_t>(j)});
  } else {
    scratch.maxima.assign(row, row + groups);
    int16_t* maxima = scratch.maxima.data();
    for (int64_t start = groups; start < d; start += groups) {
      const int16_t* part = row + start;
      const int64_t n = std::min(groups, d - start);
#pragma omp simd
      for (int64_t g = 0; g < n; ++g) maxima[g] = std::max(maxima[g], part[g]);
    }
    scratch.sorted.assign(maxima, maxima + groups);
    std::nth_element(scratch.sorted.begin(), scratch.sorted.begin() + k - 1, scratch.sorted.end(),
                     std::greater<int16_t>());
    const int16_t threshold = scratch.sorted[k - 1];
    at_least(row, d, threshold, found);
  }
  best_first(found, k);
}

constexpr int64_t LATENTS = 32;  // of a tile, and packed together
constexpr int64_t ROWS = 12;     // of a tile: 24 of the 32 registers hold its sums
constexpr int64_t BLOCK = 8 * ROWS;

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#ifdef SAETRACK_INT8

// sums[r, j] = start[r] + x[r] . w[j] for ROWS activations and LATENTS latents; then bfloat16 of sums * scale + bias *
// inverse[r], read as int16. Of x and w, four numbers of each row follow four of the one before. The intrinsic for
// the product makes GCC 12 spill the sums, which halves the speed.
void tile(const int8_t* x, int64_t d, const uint8_t* w, const int32_t* start, const float* inverse, const float* scale,
          const float* bias, int16_t* out, int64_t stride) {
  __m512i low[ROWS], high[ROWS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_set1_epi32(start[r]);
  for (int64_t i = 0; i < d; i += 4, w += 4 * LATENTS, x += 4 * ROWS) {
    const __m512i w_low = _mm512_loadu_si512(w), w_high = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      std::memcpy(&four, x + 4 * r, sizeof four);
      const __m512i numbers = _mm512_set1_epi32(four);
      asm("vpdpbusd %2, %1, %0" : "+v"(low[r]) : "v"(w_low), "v"(numbers));
      asm("vpdpbusd %2, %1, %0" : "+v"(high[r]) : "v"(w_high), "v"(numbers));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    const __m512 factor = _mm512_set1_ps(inverse[r]);
    const __m512 first = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[r]), _mm512_loadu_ps(scale),
                                         _mm512_mul_ps(_mm512_loadu_ps(bias), factor));
    const __m512 second = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r]), _mm512_loadu_ps(scale + 16),
                                          _mm512_mul_ps(_mm512_loadu_ps(bias + 16), factor));
    auto* to = reinterpret_cast<__m256i*>(out + r * stride);
    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(_mm512_srai_epi32(_mm512_castps_si512(first), 16)));
    _mm256_storeu_si256(to + 1, _mm512_cvtepi32_epi16(_mm512_srai_epi32(_mm512_castps_si512(second), 16)));
  }
}

// row * weights as integers from -127 to 127 with one scale for all, which is returned, NaN where a number is not
// finite; `to` goes on with zeros.
float quantise(const float* row, const float* weights, int64_t d, int8_t* to, int64_t size) {
  float largest = 0, zero = 0;
#pragma omp simd reduction(max : largest) reduction(+ : zero)
  for (int64_t i = 0; i < d; ++i) {
    largest = std::max(largest, std::fabs(row[i] * weights[i]));
    zero += row[i] * 0;
  }
  const float scale = (largest > 0 ? largest / 127 : 1) + zero;
  const __m512 inverse = _mm512_set1_ps(1 / scale);
  std::memset(to, 0, size);
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 mask = d - i >= 16 ? 0xffff : (1u << (d - i)) - 1;
    const __m512 numbers = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + i), _mm512_maskz_loadu_ps(mask, weights + i));
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse));
    _mm_mask_storeu_epi8(to + i, mask, _mm512_cvtsepi32_epi8(rounded));
  }
  return scale;
}

// Puts row `r` of `rows` into its places, with `added` to each number.
void interleave(const int8_t* row, int64_t size, int64_t rows, int64_t r, int added, uint8_t* to) {
  for (int64_t i = 0; i < size; ++i) to[(i / 4 * rows + r) * 4 + i % 4] = static_cast<uint8_t>(row[i] + added);
}

#endif

}  // namespace

extern "C" {

// Whether saetrack_candidates is there and faster than a product in bfloat16.
int saetrack_has_int8() {
#ifdef SAETRACK_INT8
  return 1;
#else
  return 0;
#endif
}

// pre [rows, d]: bfloat16 read as int16, which keeps the order of numbers from zero up. out [rows, k].
void saetrack_largest(const int16_t* pre, int64_t rows, int64_t d, int64_t k, int64_t* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
      largest_of_row(pre + n * d, d, k, scratch);
      for (int64_t i = 0; i < k; ++i) out[n * k + i] = scratch.found[i].column;
    }
  }
}

#ifdef SAETRACK_INT8

// Candidates for the k largest pre-activations x . w + bias of each activation, by products of 8-bit numbers.
// x [batch, d], w [d_sae, d], bias [d_sae], smooth [d]: x is divided by it and w multiplied, before rounding.
// packed: room for d_sae rounded up to 32 times d rounded up to 4. candidates [batch, width], with width >= k.
void saetrack_candidates(const float* x, const float* w, const float* bias, const float* smooth, int64_t batch,
                         int64_t d_sae, int64_t d, int64_t width, uint8_t* packed, int64_t* candidates, int threads) {
  const int64_t size = padded(d, 4), latents = padded(d_sae, LATENTS);
  std::vector<float> scale(latents, 0.f), offset(latents, 0.f), rough(d);
  for (int64_t i = 0; i < d; ++i) rough[i] = 1 / smooth[i];
  std::copy(bias, bias + d_sae, offset.begin());
#pragma omp parallel num_threads(threads)
  {
    std::vector<int8_t> row(size);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < latents; ++j) {
      if (j < d_sae)
        scale[j] = quantise(w + j * d, smooth, d, row.data(), size);
      else
        std::fill(row.begin(), row.end(), 0);
      if (!std::isfinite(scale[j])) {  // counts as the largest of all, so that it is chosen, and shows
        scale[j] = 0;
        offset[j] = NAN;
      }
      // the instruction wants one side unsigned, so 128 is added here and taken off again by `start`
      interleave(row.data(), size, LATENTS, j % LATENTS, 128, packed + j / LATENTS * LATENTS * size);
    }
    std::vector<uint8_t> inputs(BLOCK * size);
    std::vector<int16_t> pre(BLOCK * latents);
    std::vector<int32_t> start(BLOCK);
    std::vector<float> inverse(BLOCK, 1.f);
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < batch; first += BLOCK) {
      const int64_t rows = std::min(BLOCK, batch - first);
      for (int64_t r = 0; r < rows; ++r) {
        inverse[r] = 1 / quantise(x + (first + r) * d, rough.data(), d, row.data(), size);
        int32_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += row[i];
        start[r] = -128 * sum;
        interleave(row.data(), size, ROWS, r % ROWS, 0, inputs.data() + r / ROWS * ROWS * size);
      }
      for (int64_t j = 0; j < latents; j += LATENTS)
        for (int64_t r = 0; r < rows; r += ROWS)
          tile(reinterpret_cast<int8_t*>(inputs.data()) + r * size, size, packed + j * size, &start[r], &inverse[r],
               &scale[j], &offset[j], pre.data() + r * latents + j, latents);
      for (int64_t r = 0; r < rows; ++r) {
        largest_of_row(pre.data() + r * latents, d_sae, width, scratch);
        for (int64_t i = 0; i < width; ++i) candidates[(first + r) * width + i] = scratch.found[i].column;
      }
    }
  }
}

#endif

// The entries sorted by latent, and by place within one: order [n], and where each latent's part begins, offsets
// [d_sae + 1].
void saetrack_sort(const int64_t* columns, int64_t n, int64_t d_sae, int64_t* order, int64_t* offsets) {
  std::fill(offsets, offsets + d_sae + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++offsets[columns[i] + 1];
  for (int64_t j = 0; j < d_sae; ++j) offsets[j + 1] += offsets[j];
  std::vector<int64_t> next(offsets, offsets + d_sae);
  for (int64_t i = 0; i < n; ++i) order[next[columns[i]]++] = i;
}

// dots[order[p]] = left[rows[p]] . right[j] for the entries p of latent j. left [batch, d], right [d_sae, d].
void saetrack_row_dots(const float* left, const float* right, const int64_t* rows, const int64_t* order,
                       const int64_t* offsets, int64_t d_sae, int64_t d, float* dots, int threads) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
  for (int64_t j = 0; j < d_sae; ++j)
    for (int64_t p = offsets[j]; p < offsets[j + 1]; ++p) {
      if (p + 1 < offsets[j + 1]) prefetch(left + rows[p + 1] * d, d);
      dots[order[p]] = dot(left + rows[p] * d, right + j * d, d);
    }
}

// out[n] = bias + sum of values[p] * table[columns[p]] over the entries p of activation n. table [d_sae, d].
void saetrack_decode(const float* values, const float* table, const float* bias, const int64_t* columns,
                     const int64_t* offsets, int64_t batch, int64_t d, float* out, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t n = 0; n < batch; ++n) {
    std::memcpy(out + n * d, bias, d * sizeof(float));
    const int64_t end = offsets[n + 1];
    for (int64_t p = offsets[n]; p < end; ++p) {
      if (p + 2 < end) prefetch(table + columns[p + 2] * d, d);
      if (values[p] != 0) add(values[p], table + columns[p] * d, out + n * d, d);
    }
  }
}

// Both matrices' gradients in one pass. For latent j and its entries p, of activation n = rows[p] and with value v:
// into_pre = (grad[n] . decoder[j] + extra) where v > 0; into_encoder[j] = sum of into_pre * x[n], into_bias[j] = sum
// of into_pre, into_decoder[j] = sum of v * grad[n]. extra is the values' own gradient, or null for none.
void saetrack_backward(const float* x, const float* grad, const float* decoder, const float* values, const float* extra,
                       const int64_t* rows, const int64_t* order, const int64_t* offsets, int64_t d_sae, int64_t d,
                       float* into_encoder, float* into_bias, float* into_decoder, int threads) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
  for (int64_t j = 0; j < d_sae; ++j) {
    float *encoder_row = into_encoder + j * d, *decoder_row = into_decoder + j * d;
    std::memset(encoder_row, 0, d * sizeof(float));
    std::memset(decoder_row, 0, d * sizeof(float));
    float bias = 0;
    for (int64_t p = offsets[j]; p < offsets[j + 1]; ++p) {
      if (p + 1 < offsets[j + 1]) {
        prefetch(grad + rows[p + 1] * d, d);
        prefetch(x + rows[p + 1] * d, d);
      }
      const float value = values[order[p]];
      if (value <= 0) continue;  // a NaN goes on, and shows
      const float* error = grad + rows[p] * d;
      const float into_pre = dot(error, decoder + j * d, d) + (extra ? extra[order[p]] : 0);
      add(into_pre, x + rows[p] * d, encoder_row, d);
      add(value, error, decoder_row, d);
      bias += into_pre;
    }
    into_bias[j] = bias;
  }
}

// Takes out of each row of `grad` what lies along the row of `table`; a row of zeros has nothing.
void saetrack_remove_parallel(const float* table, float* grad, int64_t rows, int64_t d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < rows; ++j) {
    const float *row = table + j * d, squared = dot(row, row, d);
    if (squared > 0) add(-dot(row, grad + j * d, d) / squared, row, grad + j * d, d);
  }
}

// Brings each row of `table` to unit norm; a row of zeros stays one.
void saetrack_normalise(float* table, int64_t rows, int64_t d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < rows; ++j) {
    float* row = table + j * d;
    const float norm = std::sqrt(dot(row, row, d));
    if (norm == 0) continue;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) row[i] /= norm;
  }
}
}
