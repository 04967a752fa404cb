"""The making of ``micro``, the embedded base: corpus, tokenizer, training, model card.

Reading order: ``trainer.books`` and ``topics`` (the two sources of text), ``corpus`` (their mixture), ``tokenizer``,
``pretrain``, ``card``.
"""
