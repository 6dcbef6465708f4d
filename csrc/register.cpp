// Every CPU kernel, under the schemas of mae_fast/ops. The only file that is compiled, since
// torch's headers cost 15 seconds each time: once for each CPU capability, each into a library of
// its own, of which Python loads the one that fits (mae_fast/ops/dispatch.py).
#include "cpu/attention.h"
#include "cpu/bias_gelu.h"
#include "cpu/crop_resize_patchify_gather.h"
#include "cpu/decoder_tokens.h"
#include "cpu/layer_norm.h"
#include "cpu/linear_amx.h"
#include "cpu/masked_hog_mse.h"
#include "cpu/masked_mse.h"
#include "cpu/patch_embed.h"
#include "cpu/patchify_gather.h"
#include "cpu/randaugment.h"
#include "cpu/transposed.h"

TORCH_LIBRARY_IMPL(mae_fast, CPU, m) {
  try {
    m.impl("add_layer_norm_fwd", mae_fast::add_layer_norm_fwd);
    m.impl("add_layer_norm_bwd", mae_fast::add_layer_norm_bwd);
    m.impl("attention_fwd", mae_fast::attention_fwd);
    m.impl("attention_bwd", mae_fast::attention_bwd);
    m.impl("attention_qkv_fwd", mae_fast::attention_qkv_fwd);
    m.impl("attention_qkv_bwd", mae_fast::attention_qkv_bwd);
    m.impl("bias_gelu_fwd", mae_fast::bias_gelu_fwd);
    m.impl("bias_gelu_bwd", mae_fast::bias_gelu_bwd);
    m.impl("crop_resize_patchify_gather_fwd", mae_fast::crop_resize_patchify_gather_fwd);
    m.impl("decoder_tokens_fwd", mae_fast::decoder_tokens_fwd);
    m.impl("decoder_tokens_bwd", mae_fast::decoder_tokens_bwd);
    m.impl("layer_norm_fwd", mae_fast::layer_norm_fwd);
    m.impl("layer_norm_bwd", mae_fast::layer_norm_bwd);
    m.impl("linear_grads", mae_fast::linear_grads);
    m.impl("masked_hog_mse_fwd", mae_fast::masked_hog_mse_fwd);
    m.impl("masked_hog_mse_bwd", mae_fast::masked_mse_bwd);
    m.impl("masked_mse_fwd", mae_fast::masked_mse_fwd);
    m.impl("masked_mse_bwd", mae_fast::masked_mse_bwd);
    m.impl("patch_embed_grads", mae_fast::patch_embed_grads);
    m.impl("patch_embed_add_pos", mae_fast::patch_embed_add_pos);
    m.impl("patchify_gather_fwd", mae_fast::patchify_gather_fwd);
    m.impl("transposed", mae_fast::transposed);
  } catch (const c10::Error&) {
    // A schema has changed since this was built. Python finds that kernels are missing, and says so;
    // an error that leaves a library being loaded would end the process.
  }
}

// No operator of a model: what a data worker makes of a clip.
TORCH_LIBRARY(mae_fast_clips, m) {
  m.def("randaugment(Tensor frames, str operation, float[] numbers) -> Tensor",
        mae_fast::randaugment);
}

// What this build and this CPU can do: "", or why not.
TORCH_LIBRARY(mae_fast_cpu, m) {
  m.def("why_not_amx() -> str", [] { return std::string(mae_fast::amx::why_not()); });
}
