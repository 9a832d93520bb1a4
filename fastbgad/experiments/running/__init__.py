"""How cells are run: the ledger, claims, workers and the runner."""
