"""Answers to a recipe's sample questions, for the card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapter_format.messages import end_token_ids, plain_messages, with_system_prompt
from adapter_format.sidecar import SamplingDefaults
from trainer.conversations import Messages

MAX_SAMPLE_TOKENS = 200


def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    system_prompt: str | None,
    stop: Sequence[str],
    sampling: SamplingDefaults,
    seed: int,
) -> str:
    """The model's answer without its stop string: greedy, or sampled where ``sampling`` has a temperature above 0.

    Torch's random state does not change.
    """
    messages = with_system_prompt([{"role": "user", "content": question}], system_prompt)
    prompt = torch.tensor([prompt_ids(tokenizer, messages)])  # [1, length]
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=_generation_config(model, tokenizer, sampling, stop),
            tokenizer=tokenizer,
        )
    text = str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    return cut_at_stop(text, stop).strip()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Messages | None = None) -> list[int]:
    """Token ids of ``messages`` with the generation prompt, the same in training and serving."""
    text = tokenizer.apply_chat_template(
        plain_messages(messages, tokenizer.chat_template),
        tools=None if tools is None else [dict(tool) for tool in tools],
        tokenize=False,
        add_generation_prompt=True,
    )
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings in it."""
    positions = [text.find(string) for string in stop]
    return text[: min((position for position in positions if position >= 0), default=len(text))]


def _generation_config(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingDefaults, stop: Sequence[str]
) -> GenerationConfig:
    base = cast(PreTrainedModel, model.get_base_model())
    options: dict[str, Any] = {"stop_strings": list(stop)} if stop else {}
    if sampling.temperature:
        options |= {"do_sample": True, "top_k": 0}  # 0 keeps all tokens; transformers' default is 50
        options |= sampling.model_dump(exclude={"max_tokens"}, exclude_none=True)
    return GenerationConfig(
        max_new_tokens=min(sampling.max_tokens or MAX_SAMPLE_TOKENS, MAX_SAMPLE_TOKENS),
        eos_token_id=sorted(end_token_ids(base, tokenizer)),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **options,
    )
