// device.h on NVIDIA GPUs. The base GEMMs go to cuBLASLt with the algorithm that its heuristic gave
// the first time for a shape: past ATen, which takes the host twice as long.
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "device.h"

namespace lorapar {

cudaStream_t current_stream(at::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  return at::Tensor(at::detail::empty_cuda(sizes, type, device, std::nullopt));
}

void check_launches(const char* op) {
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, "lorapar_cuda::", op, ": ", cudaGetErrorString(error));
}

namespace {

constexpr size_t kMostWorkspace = 32 << 20;  // as PyTorch gives cuBLAS on Hopper
constexpr size_t kMostAlgorithms = 65536;    // keys hold M, which may take many values

void check(cublasStatus_t status, const char* call) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "lorapar_cuda: ", call, " failed with cuBLAS status ",
              static_cast<int>(status));
}

cublasLtHandle_t handle(int device) {  // one a device: cuBLASLt's may be shared by threads
  static std::mutex mutex;
  static std::array<cublasLtHandle_t, 64> handles = {};
  std::lock_guard<std::mutex> lock(mutex);
  auto& found = handles.at(device);
  if (found == nullptr) check(cublasLtCreate(&found), "cublasLtCreate");
  return found;
}

// cuBLAS counts columns first, so it is given out^T [N, M] = w^T x^T. All int64_t: hashed as bytes.
struct Key {
  int64_t device, type, rows, columns, depth;  // N, M, K
  int64_t stride_w, stride_x, stride_out;
  int64_t transpose_w, accumulate;
  int64_t align_w, align_x, align_out;
  bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) == 0; }
};
struct Hash {
  size_t operator()(const Key& key) const {
    int64_t words[sizeof(Key) / sizeof(int64_t)];
    std::memcpy(words, &key, sizeof(Key));
    uint64_t hash = 1469598103934665603u;
    for (const int64_t word : words) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211u;
    return hash ^ (hash >> 32);
  }
};
struct Algorithm {
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace = 0;
  bool found = false;
};

int64_t alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<int64_t>(address & (~address + 1));
}

bool steps_by_one(const at::Tensor& t, int64_t dim) { return t.size(dim) <= 1 || t.stride(dim) == 1; }

// A stride that cuBLAS takes for rows of `columns` elements; one row's may be anything in PyTorch.
int64_t row_stride(const at::Tensor& t, int64_t dim) {
  return t.size(dim) <= 1 ? t.size(1 - dim) : t.stride(dim);
}

// Whether cuBLASLt takes it as it lies.
bool make_key(const Gemm& of, Key& key) {
  const auto type = of.out.scalar_type();
  if (type != at::kHalf && type != at::kBFloat16) return false;
  const int64_t M = of.x.size(0), K = of.x.size(1), N = of.out.size(1);
  if (M == 0 || N == 0 || K == 0) return false;
  const bool rows = steps_by_one(of.w, 1);  // else columns
  if (!rows && !steps_by_one(of.w, 0)) return false;
  const int64_t stride_w = row_stride(of.w, rows ? 0 : 1);
  const int64_t stride_x = row_stride(of.x, 0), stride_out = row_stride(of.out, 0);
  if (stride_w < of.w.size(rows ? 1 : 0) || stride_x < K || stride_out < N) return false;
  key = {of.out.device().index(), type == at::kHalf ? CUDA_R_16F : CUDA_R_16BF, N, M, K,
         stride_w, stride_x, stride_out, rows == of.transposed, of.accumulate,
         alignment(of.w.data_ptr()), alignment(of.x.data_ptr()), alignment(of.out.data_ptr())};
  return true;
}

// The descriptions of one product. They live on the stack: making them costs less than a lock.
struct Description {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t w, x, out;

  explicit Description(const Key& key) {
    const auto type = static_cast<cudaDataType_t>(key.type);
    check(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "MatmulDescInit");
    const cublasOperation_t op = key.transpose_w ? CUBLAS_OP_T : CUBLAS_OP_N;
    check(cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &op, sizeof(op)),
          "MatmulDescSetAttribute");
    const auto shape = [&](cublasLtMatrixLayoutOpaque_t* to, uint64_t rows, uint64_t columns,
                           int64_t stride) {
      check(cublasLtMatrixLayoutInit(to, type, rows, columns, stride), "MatrixLayoutInit");
    };
    if (key.transpose_w) {
      shape(&w, key.depth, key.rows, key.stride_w);
    } else {
      shape(&w, key.rows, key.depth, key.stride_w);
    }
    shape(&x, key.depth, key.columns, key.stride_x);
    shape(&out, key.rows, key.columns, key.stride_out);
  }
};

Algorithm choose(const Key& key) {
  Description of(key);
  cublasLtMatmulPreferenceOpaque_t wish;
  check(cublasLtMatmulPreferenceInit(&wish), "MatmulPreferenceInit");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t what, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(&wish, what, &value, sizeof(value)),
          "MatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kMostWorkspace));
  // Partial sums stay in fp32.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(key.align_w));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(key.align_x));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(key.align_out));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(key.align_out));
  cublasLtMatmulHeuristicResult_t result = {};
  int count = 0;
  const auto status =
      cublasLtMatmulAlgoGetHeuristic(handle(static_cast<int>(key.device)), &of.product, &of.w, &of.x,
                                     &of.out, &of.out, &wish, 1, &result, &count);
  Algorithm chosen;
  if (status == CUBLAS_STATUS_SUCCESS && count > 0 && result.state == CUBLAS_STATUS_SUCCESS) {
    chosen.algorithm = result.algo;
    chosen.workspace = result.workspaceSize;
    chosen.found = true;
  }
  return chosen;
}

Algorithm algorithm(const Key& key) {
  static std::mutex mutex;
  static std::unordered_map<Key, Algorithm, Hash> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(key);
  if (at != known.end()) return at->second;
  if (known.size() >= kMostAlgorithms) known.clear();
  return known[key] = choose(key);
}

}  // namespace

size_t gemm_workspace(const Gemm& of) {
  Key key;
  return make_key(of, key) ? algorithm(key).workspace : 0;
}

void gemm(const Gemm& of, void* workspace, cudaStream_t stream) {
  Key key;
  if (!make_key(of, key)) return gemm_by_torch(of);
  const Algorithm chosen = algorithm(key);
  if (!chosen.found) return gemm_by_torch(of);
  Description as(key);
  const float alpha = 1.0f, beta = of.accumulate ? 1.0f : 0.0f;
  void* out = of.out.data_ptr();
  check(cublasLtMatmul(handle(static_cast<int>(key.device)), &as.product, &alpha, of.w.data_ptr(),
                       &as.w, of.x.data_ptr(), &as.x, &beta, out, &as.out, out, &as.out,
                       &chosen.algorithm, workspace, chosen.workspace, stream),
        "cublasLtMatmul");
}

}  // namespace lorapar
