"""What the paper measured, to stand beside what is measured or predicted here.

Source: arXiv 2205.09113, table 1: the official code, ViT-L, 800 epochs of Kinetics-400.
"""

PAPER = {
    "whose": "the paper's own, ViT-L at 90%, 800 epochs of Kinetics-400 on 128 A100",
    "model": "vit_large",
    "ratio": 0.9,
    "device": "A100",
    "gpus": 128,
    # Over masking at 0%.
    "flop": 7.7,
    "compute": 5.8,
    "with_data": 4.1,
    # Of all 128 devices, side by side.
    "compute_hours": 24.5,
    "with_data_hours": 35.8,
}
