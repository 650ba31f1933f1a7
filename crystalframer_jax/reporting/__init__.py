"""What is told of predictions: metrics, tables, figures, files."""
