"""What comes of the cells: summaries, tables, charts and the page."""
