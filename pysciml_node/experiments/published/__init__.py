"""The published experiments: data, models, settings."""
