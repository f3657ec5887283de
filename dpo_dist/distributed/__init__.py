"""Processes, ZeRO engines, checkpoints. No other package imports Accelerate or DeepSpeed (law L6)."""

import os

import torch

if not torch.cuda.is_available():  # read when DeepSpeed is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
