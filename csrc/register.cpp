// Every CPU kernel, under the schemas of mae_fast/ops. The only file that is compiled, since
// torch's headers cost 15 seconds each time: once for each CPU capability, each into a library of
// its own, of which Python loads the one that fits (mae_fast/ops/dispatch.py).
#include "cpu/layer_norm.h"

TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  m.impl("layer_norm_fwd", mae_fast::layer_norm_fwd);
  m.impl("layer_norm_bwd", mae_fast::layer_norm_bwd);
  m.impl("add_layer_norm_fwd", mae_fast::add_layer_norm_fwd);
  m.impl("add_layer_norm_bwd", mae_fast::add_layer_norm_bwd);
}
