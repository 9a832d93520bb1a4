"""The paper's experiments: what is measured, by whom, how often, and how it compares with the published numbers."""
