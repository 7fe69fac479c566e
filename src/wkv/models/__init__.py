"""The model classes, one file each and flat, so that a published checkpoint can carry copies of them."""
