"""What runs from the checkout only: `make gpu`, loss curves, other people's models, and the results
that docs/results.md is made of. On an idle machine:

    R="mae-fast bench ratio --ratios 0.9 --rounds 5"
    $R --out runs/engines --engines ours official_{eager,sdpa,sdpa_fused_adamw} \
mae_fast_without_{visible_embed,no_unshuffle,masked_last_block,shared_mask_tokens} \
official_repository@MAE_ST
    $R --out runs/peer --model videomae_base --engines ours transformers_{eager,sdpa}
    cat runs/{engines,peer}/ratio.jsonl >> benchmarks/results/ladder.jsonl
    mae-fast bench ops --out benchmarks/results/ops.jsonl
    python -m benchmarks.curves --out benchmarks/results/curves.jsonl
    make tables

MAE_ST is a checkout of facebookresearch/mae_st; benchmarks/families.py has the other families.
"""
