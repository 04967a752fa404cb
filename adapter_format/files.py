"""The names of the files in an adapter folder: PEFT's two, ours, and what may stand beside them."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SIDECAR_FILE = "quickchange.json"
TEMPLATE_FILE, TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json"
TOKENS_FILE, ADDED_FILE = "tokenizer.json", "added_tokens.json"
GENERATION_FILE = "generation_config.json"
SOURCE_FILE, CARD_FILE = "source.json", "README.md"
"""A note of the hub's repository that a folder was fetched from, and the card for people."""

COMPANION_FILES = (SIDECAR_FILE, TOKENIZER_FILE, TOKENS_FILE, ADDED_FILE, TEMPLATE_FILE, GENERATION_FILE)
"""What may stand beside PEFT's two files and says how the adapter is to be prompted."""
