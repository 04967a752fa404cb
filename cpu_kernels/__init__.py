"""Floor 0: the operations of a model on a CPU, by native kernels or by torch; imports neither server nor trainer.

Read ``kernels`` (the interface), ``linear``, ``torch_ops``, ``native_ops``, ``attention``, ``prompt_attention``,
``lora_deltas``, ``softmax``, ``layer_graph``, ``native_kernel`` (how native kernels are compiled and run). ``gemm`` and
its imports are the kernels of the native linears, by AVX-VNNI, AVX512-VNNI and AMX (``lora_tiles`` adds LoRA deltas to
them).
"""
