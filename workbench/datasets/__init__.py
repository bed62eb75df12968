"""Labelled images, attribute classifiers, networks of the hub, and the bundled avatars."""
