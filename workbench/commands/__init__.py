"""The commands of `workbench`: thin shells around the functions of the package."""
