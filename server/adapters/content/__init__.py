"""Floor 1: reads one adapter folder and checks it against the base; no torch.

Reading order: ``safe_open`` opens files, ``folder`` reads them (``file_kinds`` names others), ``peft_config`` (with
``config_fields``) and ``adapter_format.sidecar`` parse them, ``plan`` (with ``tensor_names``, ``module_plan``, ``fit``)
checks the tensors against the base's ``signature``, ``base_check`` (with ``base_samples``) whether it was trained on
this base, ``generation_defaults`` (with ``templates``, ``added_tokens``) merges what says how to prompt, ``manifest``
does all of it. ``diagnostics`` finds every problem of a folder.

- ``Listing``: the result of reading a folder's headers; enough to list an adapter.
- ``Manifest``: a listing with the folder's whole content and its digests; needed to serve an adapter.
- ``AdapterPlan``: the change of every module, part of a listing; ``ModulePlan`` is the change of one module.
- ``GenerationDefaults``: system prompt, sampling, stop strings and chat template, part of a listing.
- ``DiagnosticReport``: every problem of a folder, for ``quickchange adapters check``.
"""
