"""Benchmarks of mae_fast and its baselines, run from the checkout. On an idle machine:

    L="python -m benchmarks.ladder --out benchmarks/results/ladder.jsonl"
    $L --batch 1 4
    $L --engines official_{eager,sdpa,sdpa_fused_adamw} mae_fast_without_{visible_embed,\
no_unshuffle,masked_last_block,shared_mask_tokens} --official MAE_ST
    $L --model videomae_base --engines transformers_{eager,sdpa}
    $L --engines mae_fast_encode_all
    mae-fast bench ops --out benchmarks/results/ops.jsonl
    python -m benchmarks.curves --out benchmarks/results/curves.jsonl
    make tables

MAE_ST is a checkout of facebookresearch/mae_st.
"""
