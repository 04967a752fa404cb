"""Floor 3: the base model. ``loader`` finds it, ``admission`` judges it, ``runner`` runs a batch, ``sampler`` picks tokens."""
