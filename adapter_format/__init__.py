"""The format of an adapter folder, as the server reads it and the trainer writes it. Imports neither side."""
