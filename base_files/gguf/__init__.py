"""GGUF files: a base, or an adapter, in the container of llama.cpp.

Reading order, one module a line:

``file``          a model's files, split or not, and where they are in a folder
``header``        the header of one of them
``tensor``        its tensors, read row by row
``blocks``        their block types as floats
``fingerprint``   the fingerprint of such a file
``base``          such a file as a ``BaseSource``, with transformers' names
``architectures`` which architectures are read, and their names
``metadata``      typed values of the metadata, and which were read
``config``        the metadata as ``config.json``
``rope``          rotary embeddings, a part of it
``weights``       parameters made of stored tensors
``tokenizer``     the tokenizer and the chat template
``pretokenizers`` how it cuts text, by name

None of them imports torch.
"""
