"""Short texts with thousands of labels, most of them rare: diagnoses, places, packages."""
