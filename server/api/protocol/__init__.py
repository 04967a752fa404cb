"""Request bodies. A field that would change the answer and is not supported is refused; an unknown one is ignored.

``model`` is the base of all bodies, ``known_fields`` lists the fields that no model has, and ``misspelled`` finds the
field that was meant. ``generation`` has the fields that ``chat`` and ``completions`` share, ``messages`` those of a
conversation.
"""

from server.api.protocol.chat import ChatRequest
from server.api.protocol.completions import CompletionRequest
from server.api.protocol.embeddings import EmbeddingRequest
from server.api.protocol.generation import GenerationRequest, processed_fields
from server.api.protocol.known_fields import IGNORED, NEUTRAL

__all__ = [
    "IGNORED",
    "NEUTRAL",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "processed_fields",
]
