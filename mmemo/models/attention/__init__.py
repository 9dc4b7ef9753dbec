"""Attention: the shared prefix, fused kernels, reallocation and contrastive decoding."""
