"""The files of a base model: where they are, what identifies them, and their tensors. Imports neither side.

Reading order, one module a line:

``locate``             from a base setting to a ``BaseSource``
``names``              what bases are called
``packaged``           bases that a Python package carries
``source``             what every format offers: config, tensors, fingerprints
``tensors``            a tensor in a weight file, read row by row
``experts``            the experts of a mixture, one at a time
``weight_files``       the weight files of a folder
``safetensors_header`` the tensors of such a file
``fingerprint``        what ties an adapter to its base
``weights_sample``     a sample of a base, which formats have in common
``common_architecture`` its architecture, ``vocabulary`` its tokens
``sample_comparison``  whether two samples are of the same base
``gguf``               GGUF files, the other container: a package of its own
``mxfp4``              values and scales of MXFP4
``memory``             how much is left for a base
``load_progress``      how much of a large one was read
``deferred_weights``   weights that are read when they are needed, and released
``stock_model``        transformers' config, tokenizer and model of a source
``errors``             what can be wrong

Only ``stock_model`` and ``deferred_weights`` import torch.
"""
