"""The recipes of the demo adapters, and in ``demos`` the conversations that two of them are trained on."""
