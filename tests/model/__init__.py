"""The proof that the engine is right: ``families`` are the models, ``harness`` hosts one, ``test_*`` compare."""
