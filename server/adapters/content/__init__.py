"""Floor 1: reads one adapter folder and checks it against the base; no torch.

Reading order: ``safe_open`` opens files, ``folder`` reads them, ``peft_config`` and ``adapter_format.sidecar`` parse
them, ``plan`` (with ``tensor_names``, ``module_plan``, ``fit``) checks the tensors, ``manifest`` does all of it.

- ``Listing``: the result of reading a folder's headers; enough to list an adapter.
- ``Manifest``: a listing with the folder's whole content and its digests; needed to serve an adapter.
- ``AdapterPlan``: the change of every module, part of a listing; ``ModulePlan`` is the change of one module.
- ``GenerationDefaults``: system prompt, sampling, stop strings and chat template, part of a listing.
- ``DiagnosticReport``: every problem of a folder, for ``quickchange adapters check``.
"""
