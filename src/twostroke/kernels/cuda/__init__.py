"""The op table on an NVIDIA GPU: PyTorch for memory and dense products, Triton for the rest."""
