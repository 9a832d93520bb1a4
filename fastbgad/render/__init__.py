"""What people look at: progress bars, tables, plots and pages."""
