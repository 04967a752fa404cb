"""Floor 1: what one adapter folder says, and whether it fits the base; no torch.

``folder`` reads bytes once; ``peft_config`` and ``adapter_format.sidecar`` parse them; ``plan`` says what the tensors
do to which modules, ``generation_defaults`` its prompt and sampling; ``manifest`` is all of it, ``diagnostics`` all
that is wrong with it.
"""
