"""What a run reports: console, metrics, pictures, traces."""
