"""Floor 3: the base model.

``loader`` finds it, ``admission`` judges it, ``runner`` runs a batch through it, ``sampler`` picks tokens,
by ``drawing`` where they are random.
"""
