"""Floor 7: the commands beside serving."""
