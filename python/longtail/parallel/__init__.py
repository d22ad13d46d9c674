"""Losses whose rows or classes are shared out over ranks; what the ranks tell each other."""
