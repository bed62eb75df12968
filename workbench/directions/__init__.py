"""Directions in h and boundaries in x and h: how they are found, combined and saved."""
