// C names for csrc/decode.cu. `cluster`: blocks of one, as on sm_90; 1 as on older cards.
#include "cluster.h"
#include "kernels.h"

extern "C" void decode(const lorapar::DecodeProjection* of, int projections, lorapar::Matrix x,
                       int64_t M, int64_t K, int type, const lorapar::DecodeDropout* dropout,
                       int cluster) {
  lorapar::emulated_cluster = cluster;
  lorapar::decode(of, projections, x, M, K, static_cast<lorapar::Type>(type), *dropout, nullptr);
}
