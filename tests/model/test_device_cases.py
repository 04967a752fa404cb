"""One of the cases that tests/gpu runs on a GPU, on the CPU with attention as it is there; tests/full has them all."""

from __future__ import annotations

from tests.model.device_cases import check, loaded, on_mixed_adapters


def test_adapters_beside_each_other_say_with_batched_attention_what_they_say_on_the_cpu() -> None:
    with loaded("cpu") as cpu, loaded("cpu", batched=True) as other:
        check(on_mixed_adapters, cpu, other)
