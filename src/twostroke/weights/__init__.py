"""Model files in: GGUF and safetensors read, checked, named; models fetched and kept.

Nothing here computes. A file is either understood whole, or refused by the name of the key or
tensor at fault; tensors stay on the memory-mapped file until a kernel touches them.
"""
