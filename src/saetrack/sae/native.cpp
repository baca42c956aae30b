// The inner loops of a sparse step on a CPU. Every output row is written by one thread, in an order that does not
// depend on the number of threads: equal inputs give equal bits. Plain C symbols, so that no header of PyTorch is needed.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace {

float dot(const float* a, const float* b, int64_t d) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += a[i] * b[i];
  return sum;
}

// Rows are read in no order that the hardware could guess.
void prefetch(const float* row, int64_t d) {
  for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(row + i);
}

struct Candidate {
  int16_t value;
  int32_t column;
};

bool larger(const Candidate& a, const Candidate& b) {
  return a.value != b.value ? a.value > b.value : a.column < b.column;
}

// The k largest lie in groups whose maximum is at least the k-th largest maximum, and few other numbers reach that.
// Group g is every `groups`-th number from g on, so that the maxima of all groups run along memory.
void largest_of_row(const int16_t* row, int64_t d, int64_t k, int64_t groups, int64_t* out, int16_t* maxima,
                    std::vector<int16_t>& sorted, std::vector<Candidate>& found) {
  found.clear();
  if (groups == 0) {
    for (int64_t j = 0; j < d; ++j) found.push_back({row[j], static_cast<int32_t>(j)});
  } else {
    std::memcpy(maxima, row, groups * sizeof(int16_t));
    for (int64_t start = groups; start < d; start += groups) {
      const int16_t* part = row + start;
      const int64_t n = std::min(groups, d - start);
#pragma omp simd
      for (int64_t g = 0; g < n; ++g) maxima[g] = std::max(maxima[g], part[g]);
    }
    sorted.assign(maxima, maxima + groups);
    std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<int16_t>());
    const int16_t threshold = sorted[k - 1];
    for (int64_t g = 0; g < groups; ++g) {
      if (maxima[g] < threshold) continue;
      for (int64_t j = g; j < d; j += groups)
        if (row[j] >= threshold) found.push_back({row[j], static_cast<int32_t>(j)});
    }
  }
  if (static_cast<int64_t>(found.size()) > k)
    std::nth_element(found.begin(), found.begin() + k - 1, found.end(), larger);
  for (int64_t i = 0; i < k; ++i) out[i] = found[i].column;
}

}  // namespace

extern "C" {

// pre [rows, d]: bfloat16 read as int16, which keeps the order of numbers from zero up. out [rows, k].
void saetrack_largest(const int16_t* pre, int64_t rows, int64_t d, int64_t k, int64_t* out, int threads) {
  int64_t groups = 256;
  while (groups < 8 * k) groups *= 2;
  if (2 * groups > d) groups = 0;
#pragma omp parallel num_threads(threads)
  {
    std::vector<int16_t> maxima(groups), sorted;
    std::vector<Candidate> found;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n)
      largest_of_row(pre + n * d, d, k, groups, out + n * k, maxima.data(), sorted, found);
  }
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
}
