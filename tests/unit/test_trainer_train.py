"""The loop: what a step computes, and that it learns."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Gemma2Config, Gemma2ForCausalLM

from base_files.fingerprint import base_fingerprint
from tests.tiny_models import build_tiny_base
from trainer.base import TrainingBase, load_base
from trainer.batches import TrainingBatch, collate, plan_steps
from trainer.config import LoraSettings, TrainConfig
from trainer.data import Dataset
from trainer.errors import BaseModelError, RecipeError, TrainingError
from trainer.loss import TokenLoss, full_logits
from trainer.masking import IGNORED, Encoded
from trainer.train import accumulate, add_lora, lr_scale, train, uses_bfloat16


@pytest.fixture
def base(tmp_path: Path) -> TrainingBase:
    return load_base(str(build_tiny_base(tmp_path / "base")))


def _with_lora(base: TrainingBase) -> PeftModel:
    """LoRA with a B that is not zero, so that every gradient is something."""
    model = add_lora(base.model, LoraSettings(r=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def _examples(count: int) -> list[Encoded]:
    rng = random.Random(0)
    examples = []
    for _ in range(count):
        ids = [rng.randrange(100, 500) for _ in range(rng.randint(4, 30))]
        prompt = rng.randint(1, len(ids) - 1)
        examples.append(Encoded(ids, [IGNORED] * prompt + ids[prompt:]))
    return examples


def _gradients(model: PeftModel) -> torch.Tensor:
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradients


def _config(**more: object) -> TrainConfig:
    data = [{"path": "x.jsonl", "format": "messages"}]
    return TrainConfig.model_validate(
        {"name": "fox", "base_model": "micro", "data": data, "max_steps": 10, "dtype": "float32", **more}
    )


def _dataset(training: list[Encoded], evaluation: list[Encoded]) -> Dataset:
    return Dataset(training, evaluation, num_held_out=len(evaluation), num_duplicates=0, num_truncated=0)


def test_many_small_batches_give_the_loss_and_gradients_of_one_big_batch(base: TrainingBase) -> None:
    model, examples = _with_lora(base), _examples(12)
    loss = TokenLoss(model, bfloat16=False)
    one = accumulate(loss, examples, [list(range(12))])
    gradients = _gradients(model)
    many = accumulate(loss, examples, [[3], [0, 1, 2], [4, 5, 6, 7, 8, 9, 10], [11]])
    assert many == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(_gradients(model), gradients, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_padding_changes_nothing(base: TrainingBase) -> None:
    model, examples = _with_lora(base), _examples(5)
    loss = TokenLoss(model, bfloat16=False)
    together = float(loss(collate(examples)))
    assert together == pytest.approx(sum(float(loss(collate([example]))) for example in examples), rel=1e-5)


@torch.no_grad()
def test_logits_at_trained_positions_alone_give_transformers_loss(base: TrainingBase) -> None:
    model, batch = _with_lora(base), collate(_examples(5))
    loss = TokenLoss(model, bfloat16=False)
    assert loss.skips_untrained
    assert float(loss(batch)) == pytest.approx(_reference(model, batch), rel=1e-5)


@torch.no_grad()
def test_a_soft_cap_on_the_logits_is_honoured() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.1,
    )
    model = add_lora(Gemma2ForCausalLM(config), LoraSettings(), seed=0)
    loss = TokenLoss(model, bfloat16=False)
    batch = collate(_examples(5))
    assert not loss.skips_untrained
    assert float(loss(batch)) == pytest.approx(_reference(model, batch), rel=1e-5)


def _reference(model: PeftModel, batch: TrainingBatch) -> float:
    logits = full_logits(model, batch.input_ids)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"))


def test_ten_steps_lower_the_loss_and_leave_the_base_alone(base: TrainingBase) -> None:
    examples = _examples(20)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    model = add_lora(base.model, LoraSettings(), seed=1)
    history = train(model, _dataset(examples, examples), _config(lr=0.02, eval_every=5))
    assert len(history.steps) == 10 and history.epochs == pytest.approx(10)
    assert history.num_trained_tokens == 10 * sum(example.num_trained for example in examples)
    assert history.base_eval_loss is not None and history.eval_loss is not None
    assert history.eval_loss < history.base_eval_loss - 0.1
    assert [step for step, _ in history.evaluations] == [5, 10]
    after = model.unload().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_same_seed_trains_the_same_adapter(tmp_path: Path) -> None:
    folder = str(build_tiny_base(tmp_path / "base"))
    runs = [
        train(
            add_lora(load_base(folder).model, LoraSettings(dropout=0.1), seed=3),
            _dataset(_examples(9), []),
            _config(seed=3),
        )
        for _ in range(2)
    ]
    assert runs[0].steps == runs[1].steps


def test_a_loss_that_is_no_number_stops_the_run(base: TrainingBase) -> None:
    model = _with_lora(base)
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1 is nan: lower lr"):
        train(model, _dataset(_examples(4), []), _config())


def test_targets_that_match_no_module_are_refused(base: TrainingBase) -> None:
    with pytest.raises(RecipeError, match=r"lora\.target_modules"):
        add_lora(base.model, LoraSettings(target_modules=["no_such_proj"]), seed=0)


def test_a_step_holds_its_tokens_and_an_epoch_every_example_once() -> None:
    lengths = [random.Random(i).randint(5, 60) for i in range(100)]
    steps = plan_steps(lengths, batch_tokens=300, micro_batch_tokens=128, epochs=2, max_steps=None, seed=0)
    flat = [index for step in steps for micro_batch in step for index in micro_batch]
    assert sorted(flat[:100]) == sorted(flat[100:]) == list(range(100))
    assert flat[:100] != flat[100:]
    for step in steps:
        assert sum(lengths[index] for micro_batch in step for index in micro_batch) < 300 + 60
        assert all(len(batch) * max(lengths[index] for index in batch) <= 128 for batch in step)


def test_max_steps_ends_the_plan_whatever_the_epochs() -> None:
    def count(epochs: int | None, max_steps: int | None) -> int:
        return len(
            plan_steps([10] * 10, batch_tokens=50, micro_batch_tokens=50, epochs=epochs, max_steps=max_steps, seed=0)
        )

    assert (count(3, None), count(3, 4), count(None, 9), count(1, 9)) == (6, 4, 9, 2)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_the_rate_rises_then_follows_its_schedule(schedule: str, middle: float) -> None:
    config = _config(schedule=schedule, warmup_ratio=0.2)
    assert [lr_scale(step, 10, config) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert lr_scale(6, 10, config) == pytest.approx(middle)


def test_dtype_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_bfloat16("bfloat16") and not uses_bfloat16("float32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not uses_bfloat16("auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert uses_bfloat16("auto")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not uses_bfloat16("auto"), "what ATEN_CPU_CAPABILITY forbids is not there"


def test_the_fingerprint_knows_other_weights_and_another_config(tmp_path: Path) -> None:
    folder = build_tiny_base(tmp_path / "base")
    original = base_fingerprint(folder)
    assert base_fingerprint(build_tiny_base(tmp_path / "same")) == original
    assert base_fingerprint(build_tiny_base(tmp_path / "other", seed=1)) != original
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"use_cache": true', '"use_cache": false'), encoding="utf-8")
    assert base_fingerprint(folder) == original
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), encoding="utf-8")
    assert base_fingerprint(folder) != original


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = build_tiny_base(tmp_path / "base")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match="missing or malformed"):
        load_base(str(folder))


def test_a_base_that_is_nowhere_is_refused() -> None:
    with pytest.raises(BaseModelError, match="no such folder"):
        load_base("./no/such/folder")


def test_a_base_whose_name_cannot_be_a_path_is_refused() -> None:
    """It was an UnboundLocalError: the message named a folder that had not been found."""
    with pytest.raises(BaseModelError, match=r"its path cannot be used|no such folder"):
        load_base("x" * 300)
