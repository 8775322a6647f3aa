"""A small sample of real data for ``zoft demo``; README.md beside it states origin and licence."""
