"""Names of fields that no model of a body has: those without effect, and those that are refused.

A field stands here until it is honoured. All other unknown fields are taken and have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Accepted with any value: they have no effect on the answer.
IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "verbosity",
    }
)
# They would change the answer and are not honoured: accepted only with a value that has no effect.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
    # vLLM's
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "early_stopping": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # those of llama.cpp, Ollama, text-generation-inference and hosted services
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "format": ("",),
    "image_data": ([],),
    "lora": ([],),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "mirostat": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "options": ({},),
    "plugins": ([],),
    "reasoning": ({},),
    "repeat_penalty": (1,),
    "template": (),
    "think": (),
    "thinking": (),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "transforms": ([],),
    "truncate": (),
    "typical_p": (1,),
    "tfs_z": (1,),
    "watermark": (False,),
    "xtc_probability": (0,),
}
# What to write in the place of a field that is refused.
INSTEAD: Mapping[str, str] = {
    "chat_template": "the chat template is the adapter's or the base's",
    "format": "use 'response_format'",
    "function_call": "use 'tool_choice'",
    "functions": "use 'tools'",
    "max_new_tokens": "use 'max_tokens'",
    "max_output_tokens": "use 'max_tokens'",
    "n_predict": "use 'max_tokens'",
    "n_probs": "use 'logprobs' and 'top_logprobs'",
    "options": "write its fields into the body itself",
    "reasoning": "use 'reasoning_effort'",
    "repeat_penalty": "use 'repetition_penalty'",
    "template": "the chat template is the adapter's or the base's",
    "think": "use 'reasoning_effort' or 'chat_template_kwargs'",
    "thinking": "use 'reasoning_effort' or 'chat_template_kwargs'",
}
# Known fields of other servers' bodies that look like a misspelled field of ours, and have no effect.
LOOKALIKES = frozenset({"context", "mode", "models"})
