"""What one step of each task computes: collate, count, losses."""
