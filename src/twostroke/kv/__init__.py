"""KV memory as block ids: who holds which, which are free, which hold a known prefix. No bytes."""
