"""The operators: schemas, backends and their choice, and what the families share around them."""
