"""LangChain's own integration tests of a chat model, for pytest in an environment that has them.

QUICKCHANGE_URL is the server, QUICKCHANGE_MODEL the model.
"""

import os

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestQuickchange(ChatModelIntegrationTests):
    """A text model with tools and structured output."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict:
        return {
            "base_url": os.environ["QUICKCHANGE_URL"] + "/v1",
            "model": os.environ["QUICKCHANGE_MODEL"],
            "api_key": "none",
            "temperature": 0,
            "frequency_penalty": 0.5,  # a small model repeats itself in a long string
            "max_tokens": 512,
            "stream_usage": True,
            "seed": 1,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return os.environ["QUICKCHANGE_MODEL"] + "-helpdesk"
