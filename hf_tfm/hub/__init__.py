"""Hub integration: run records, model cards, loading and uploading of models."""
