"""All cases that tests/gpu runs on a GPU, on the CPU with attention as it is there."""

from __future__ import annotations

from tests.model.device_cases import CASES, check, check_in_bfloat16, loaded


def test_batched_attention_says_what_the_cpu_says() -> None:
    with loaded("cpu") as cpu, loaded("cpu", batched=True) as other:
        for case in CASES:
            check(case, cpu, other)


def test_it_serves_in_bfloat16() -> None:
    with loaded("cpu") as cpu, loaded("cpu", "bfloat16", batched=True) as rounded:
        check_in_bfloat16(cpu, rounded)
