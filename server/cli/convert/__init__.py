"""``quickchange adapters convert``: adapters of other trainers and other tuners, as PEFT's LoRA folders.

Serving never imports this package. Reading order: ``command`` (flags, and which way a source goes), ``source`` (which
format a path is in; converted, checked on the base, published), then by format ``mlx``, ``gguf`` and ``ollama`` (with
``go_template``, its templates as Jinja), ``lora_folder`` (tensors written as PEFT would), and ``tuners`` (PEFT's other
tuners, approximated by LoRA).
"""
