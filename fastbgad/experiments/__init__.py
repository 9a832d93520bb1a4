"""The paper's experiments: plans, running, results, and methods of other authors."""
