"""Files of other projects, and tensors with a JSON header."""
