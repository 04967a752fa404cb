"""Request bodies. An unknown field, or one that would change the answer but is not supported, is refused by name.

``model`` is the base of all bodies. ``generation`` has the fields that ``chat`` and ``completions`` share, ``messages``
those of a conversation.
"""

from server.api.protocol.chat import ChatRequest
from server.api.protocol.completions import CompletionRequest
from server.api.protocol.embeddings import EmbeddingRequest
from server.api.protocol.generation import IGNORED, NEUTRAL, GenerationRequest, processed_fields

__all__ = [
    "IGNORED",
    "NEUTRAL",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "processed_fields",
]
