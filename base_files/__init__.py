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
``gguf``               GGUF, the other container: a model's files, split or not
``gguf_header``        the header of one of them
``gguf_tensor``        its tensors, read row by row
``gguf_blocks``        their block types as floats
``gguf_fingerprint``   the fingerprint of such a file
``gguf_base``          such a file as a ``BaseSource``, with transformers' names
``gguf_architectures`` which architectures are read, and their names
``gguf_metadata``      typed values of the metadata, and which were read
``gguf_config``        the metadata as ``config.json``
``gguf_rope``          rotary embeddings, a part of it
``gguf_weights``       parameters made of stored tensors
``gguf_tokenizer``     the tokenizer and the chat template
``gguf_pretokenizers`` how it cuts text, by name
``mxfp4``              values and scales of MXFP4
``memory``             how much is left for a base
``load_progress``      how much of a large one was read
``deferred_weights``   weights that are read when they are needed, and released
``stock_model``        transformers' config, tokenizer and model of a source
``errors``             what can be wrong

Only ``stock_model`` and ``deferred_weights`` import torch.
"""
