"""What is run: protocols, cells and the published numbers."""
