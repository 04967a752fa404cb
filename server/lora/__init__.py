"""Floor 2: LoRA in tensors. ``weights`` are one adapter's, ``bank`` holds all, ``layer`` adds them to a linear."""
