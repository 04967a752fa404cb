"""Floor 1: tool calls in the text of an answer, and the grammar and the prompt that make a model write them."""
