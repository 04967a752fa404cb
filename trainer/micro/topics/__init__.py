"""The generators of conversations: one module a topic, each with ``sample(rng) -> Conversation``."""
