"""Pages that need no network: a report, and one text to explore."""
