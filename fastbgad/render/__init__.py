"""Output for people: progress bars, tables, plots and pages."""
