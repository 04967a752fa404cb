"""What the commands beside this package are made of. Reading order: figures, pairs, jobs, engines; then the rest."""
