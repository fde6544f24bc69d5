"""Steps of many members, each of its own size, taken in one batch."""
