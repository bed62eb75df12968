"""Edits, their rendering and measurement, crossings of boundaries, disentangling, the search for the mixing step."""
