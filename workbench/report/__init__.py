"""Figures, claims of the papers, notebooks as reports, sweeps."""
