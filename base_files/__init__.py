"""The files of a base model: where they are, what identifies them, and their tensors. Imports neither side."""
