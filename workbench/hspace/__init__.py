"""Extraction of h to disk by one process or many, reading it, and its estimated cost."""
